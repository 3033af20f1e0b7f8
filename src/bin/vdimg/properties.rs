//! `vdimg setuuid`, `vdimg comment` and `vdimg geometry`.

use super::args::{Comment, Geometry, Labelled, Output, SetUuid};
use super::terminal::{self, print};
use serde_json::json;
use uuid::Uuid;
use vdblk::Result;
use vdblk::format::{Chs, Properties};
use vdblk::job::{self, inspect_image_with, set_properties};
use vdblk::map::ImageInfo;
use vdblk::vd::ImageSpec;

pub(crate) fn set_uuid(args: &SetUuid) -> Result<u8> {
    let others = [args.modification, args.parent, args.parent_modification];
    let random = args.random || (args.uuid.is_none() && others.iter().all(Option::is_none));
    let new = Properties {
        uuid: args.uuid.or_else(|| random.then(Uuid::new_v4)),
        modification_uuid: args.modification,
        parent_uuid: args.parent,
        parent_modification_uuid: args.parent_modification,
        ..Properties::default()
    };
    let info = set(&args.image, new, args.force)?;
    let all = [
        ("uuid", "UUID", info.uuid),
        ("modification_uuid", "modification UUID", info.modification_uuid),
        ("parent_uuid", "parent UUID", info.parent_uuid),
        ("parent_modification_uuid", "parent modification UUID", info.parent_modification_uuid),
    ];
    let text = match args.output {
        Output::Human => {
            all.iter().filter_map(|(_, name, uuid)| Some(format!("{name}: {}\n", (*uuid)?))).collect()
        }
        Output::Json => {
            let map = all.iter().map(|(key, _, uuid)| (key.to_string(), json!(uuid.map(|u| u.to_string()))));
            pretty(&serde_json::Value::Object(map.collect()))
        }
    };
    print(&text)?;
    Ok(0)
}

pub(crate) fn comment(args: &Comment) -> Result<u8> {
    let wish = args.set.clone().or_else(|| args.clear.then(String::new));
    if wish.is_some() {
        set(&args.image, Properties { comment: wish, ..Properties::default() }, false)?;
        return Ok(0);
    }
    let comment = look(&args.image)?.comment;
    let text = match args.output {
        Output::Json => pretty(&json!({ "comment": comment })),
        // Whoever made the image chose the text: no control characters reach the terminal.
        Output::Human => comment.map_or_else(String::new, |c| {
            let shown = |l: &str| l.chars().filter(|c| !c.is_control()).chain(['\n']).collect::<String>();
            c.lines().map(shown).collect()
        }),
    };
    print(&text)?;
    Ok(0)
}

pub(crate) fn geometry(args: &Geometry) -> Result<u8> {
    if args.set.is_some() || args.lchs.is_some() {
        let new = Properties { geometry: args.set, logical_geometry: args.lchs, ..Properties::default() };
        set(&args.image, new, false)?;
        return Ok(0);
    }
    let info = look(&args.image)?;
    // A VDI has the logical one alone.
    let physical = info.geometry.filter(|_| info.format != "vdi");
    let text = match args.output {
        Output::Json => {
            let json =
                |g: Option<Chs>| g.map(|(c, h, s)| json!({ "cylinders": c, "heads": h, "sectors": s }));
            pretty(&json!({ "geometry": json(physical), "logical_geometry": json(info.logical_geometry) }))
        }
        Output::Human => {
            let line = |name: &str, g: Option<Chs>| {
                g.map_or_else(|| format!("{name}: none\n"), |(c, h, s)| format!("{name}: {c}/{h}/{s}\n"))
            };
            line("physical", physical) + &line("logical", info.logical_geometry)
        }
    };
    print(&text)?;
    Ok(0)
}

fn pretty(value: &serde_json::Value) -> String {
    serde_json::to_string_pretty(value).expect("texts and numbers") + "\n"
}

fn spec(image: &Labelled) -> ImageSpec {
    ImageSpec { path: image.file.clone(), format: image.format }
}

fn look(image: &Labelled) -> Result<ImageInfo> {
    Ok(inspect_image_with(&spec(image), image.allow_raw_device)?.info)
}

fn set(image: &Labelled, properties: Properties, force: bool) -> Result<ImageInfo> {
    terminal::end_in_order();
    let how = job::SetProperties {
        image: spec(image),
        lock_wait: image.lock.wait(),
        allow_raw_device: image.allow_raw_device,
        properties,
        force,
    };
    terminal::watched(|watch| set_properties(&how, watch))
}
