//! `vdimg formats`.

use super::args::{Formats, Output};
use super::terminal::print;
use serde_json::json;
use std::fmt::Write;
use vdblk::Result;
use vdblk::container::{BackendCaps, BackendInfo, backend_info};
use vdblk::filter::{FilterInfo, filter_info};
use vdblk::format::Property;

pub(crate) fn run(args: &Formats) -> Result<u8> {
    let all = backend_info();
    let text = match args.output {
        Output::Human => {
            let filters = filter_info();
            all.iter().map(human).chain([filters_for_people(&filters)]).collect::<Vec<_>>().join("\n")
        }
        Output::Json => {
            let values: Vec<_> = all.iter().map(value).collect();
            serde_json::to_string_pretty(&values).expect("texts and numbers") + "\n"
        }
    };
    print(&text)?;
    Ok(0)
}

fn caps(b: &BackendInfo) -> Vec<&'static str> {
    BackendCaps::ALL.iter().filter(|(flag, _)| b.caps.contains(*flag)).map(|(_, name)| *name).collect()
}

fn properties(b: &BackendInfo) -> Vec<&'static str> {
    Property::ALL.into_iter().filter(|p| b.format.keeps(*p)).map(Property::name).collect()
}

fn value(b: &BackendInfo) -> serde_json::Value {
    let extensions: Vec<_> = b
        .extensions
        .iter()
        .map(|e| json!({ "extension": e.extension, "device_type": e.device.name() }))
        .collect();
    let config: Vec<_> = b
        .config
        .iter()
        .map(|k| json!({ "key": k.key, "type": k.value.name(), "default": k.default }))
        .collect();
    json!({
        "format": b.format.name(),
        "name": b.name,
        "capabilities": caps(b),
        "capability_bits": b.caps.bits(),
        "extensions": extensions,
        "options": config,
        "properties": properties(b),
        "plugin": b.plugin,
    })
}

/// Writing to a String does not fail.
fn human(b: &BackendInfo) -> String {
    let mut t = String::new();
    let _ = writeln!(t, "{}: --format {}", b.name, b.format);
    let _ = writeln!(t, "  capabilities: {} ({:#x})", caps(b).join(", "), b.caps.bits());
    let extensions = b.extensions.iter().map(|e| format!(".{} ({})", e.extension, e.device.name()));
    let _ = writeln!(t, "  extensions: {}", extensions.collect::<Vec<_>>().join(", "));
    for k in &b.config {
        let default = k.default.map_or_else(String::new, |d| format!(" [default: {d}]"));
        let _ = writeln!(t, "  option: {}, {}{default}", k.key, k.value.name());
    }
    let kept = properties(b);
    if let Some(file) = b.plugin {
        let _ = writeln!(t, "  plug-in: {file}");
    }
    if !kept.is_empty() {
        let _ = writeln!(t, "  says of itself: {}", kept.join(", "));
    }
    t
}

/// The filters there are, a line each.
fn filters_for_people(filters: &[FilterInfo]) -> String {
    let mut t = String::new();
    for f in filters {
        let from = f.origin.as_ref().map_or_else(
            || "encryption as VirtualBox does it: --password-file FILE --key-store FILE".into(),
            |file| format!("--filter {}[=TEXT], plug-in: {file}", f.name),
        );
        let _ = writeln!(t, "filter {}: {from}", f.name);
    }
    t
}
