//! What vdblk can make images of: asked of the library, so that a format that learns to be created joins every test that
//! goes over them.

use std::fmt;
use std::path::Path;
use uuid::Uuid;
use vdblk::format::{self, Format, NewImage, NewParent};
use vdblk::map::ImageInfo;

/// Every name of a variant that some format knows. Other names for the same are left out.
const VARIANTS: [&str; 8] =
    ["dynamic", "fixed", "zero-expand", "flat", "split2g", "split2g-flat", "esx", "stream"];
/// Options that change how an image is laid out.
const OPTIONS: [&[&str]; 12] = [
    &["AllocationBlockSize=64K"],
    &["AllocationBlockSize=4M"],
    &["block_size=512K"],
    &["block_size=1M"],
    &["grain_size=4K"],
    &["zeroed_grain=on"],
    &["compat=0.10"],
    &["extended_l2=on"],
    &["cluster_size=512"],
    &["cluster_size=4K"],
    &["cluster_size=2M"],
    &["cluster_size=1M", "refcount_bits=1"],
];
/// Disk that every shape can have.
const SOME_SIZE: u64 = 8 << 20;

/// A way to make an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) format: Format,
    pub(crate) variant: Option<&'static str>,
    pub(crate) options: &'static [&'static str],
}

impl Shape {
    fn plain(format: Format) -> Shape {
        Shape { format, variant: None, options: &[] }
    }

    /// The words of `vdimg create` or, with `key` as `--output-format`, of `vdimg convert`.
    pub(crate) fn words(&self, key: &str) -> String {
        let mut words = format!("{key} {}", self.format);
        words.extend(self.variant.map(|v| format!(" --variant {v}")));
        words.extend(self.options.iter().map(|o| format!(" --option {o}")));
        words
    }

    /// A file's name that says what it is.
    pub(crate) fn file(&self, stem: &str) -> String {
        format!("{stem}.{}", self.format.extensions()[0])
    }

    /// Images of it can have a parent.
    pub(crate) fn can_be_diff(&self) -> bool {
        self.is_possible(true)
    }

    fn is_possible(&self, diff: bool) -> bool {
        format::blueprint(self.format, &self.wish(diff)).is_ok()
    }

    /// Images of it are written once, in order, when they are made.
    fn is_sequential(&self) -> bool {
        matches!(format::sequential(self.format, &self.wish(false)), Ok(Some(_)))
    }

    fn wish(&self, diff: bool) -> NewImage {
        let info = ImageInfo {
            format: "raw",
            uuid: Some(Uuid::from_u128(1)),
            virtual_size: SOME_SIZE,
            ..ImageInfo::default()
        };
        let both =
            |o: &&str| o.split_once('=').map(|(k, v)| (k.to_string(), v.to_string())).expect("KEY=VALUE");
        NewImage {
            file_name: self.file("a"),
            size_bytes: SOME_SIZE,
            variant: self.variant.map(str::to_string),
            uuid: None,
            modification: Uuid::from_u128(2),
            parent: diff.then(|| NewParent { info, path: Some("base.raw".into()) }),
            comment: None,
            geometry: None,
            options: self.options.iter().map(both).collect(),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let more = self.variant.iter().chain(self.options);
        write!(f, "{}{}", self.format, more.map(|m| format!(" {m}")).collect::<String>())
    }
}

/// The formats that can be created.
pub(crate) fn formats() -> impl Iterator<Item = Format> {
    Format::ALL.into_iter().filter(|f| f.can_be_created())
}

/// One shape for each format.
pub(crate) fn plain() -> Vec<Shape> {
    formats().map(Shape::plain).collect()
}

/// Every variant of every format, and its plain one with each set of options it takes: those that are made empty, to be
/// written to.
pub(crate) fn writable() -> Vec<Shape> {
    let of = |format| {
        let plain = Shape::plain(format);
        let variants = VARIANTS.map(|v| Shape { variant: Some(v), ..plain.clone() });
        let options = OPTIONS.map(|options| Shape { options, ..plain.clone() });
        variants.into_iter().chain(options).filter(|s| s.is_possible(false))
    };
    let shapes: Vec<_> = formats().flat_map(of).collect();
    assert!(
        formats().all(|f| shapes.iter().any(|s| s.format == f)),
        "a format of no known variant: {shapes:?}"
    );
    shapes
}

/// Those that `vdimg convert` makes: images that are written once as well.
pub(crate) fn convertible() -> Vec<Shape> {
    let of = |format| VARIANTS.map(|v| Shape { variant: Some(v), ..Shape::plain(format) });
    let once = formats().flat_map(of).filter(Shape::is_sequential);
    writable().into_iter().chain(once).collect()
}

/// The writable ones that can have a parent.
pub(crate) fn diffs() -> Vec<Shape> {
    writable().into_iter().filter(Shape::can_be_diff).collect()
}

/// The same with a shape for each format.
pub(crate) fn plain_diffs() -> Vec<Shape> {
    plain().into_iter().filter(Shape::can_be_diff).collect()
}

/// Every file of an image: VMDK's extents begin with its name.
pub(crate) fn remove(dir: &Path, stem: &str) {
    for entry in std::fs::read_dir(dir).expect("folder") {
        let path = entry.expect("entry").path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name.strip_prefix(stem).is_some_and(|rest| rest.starts_with(['.', '-'])) {
            std::fs::remove_file(path).expect("remove");
        }
    }
}
