//! New VDIs: what a blueprint writes opens, checks clean and says what was asked for.

mod format_support;

use format_support::{FileSource, Layer, read_all};
use std::os::unix::fs::FileExt;
use uuid::Uuid;
use vdblk::format::vdi::{self, Parent, Variant, VdiCreate};
use vdblk::format::{Format, OpenHow, open_single};
use vdblk::map::{ExtentKind, ExtentList, FileId, GuestOffset, GuestRange, ImageMap, Intent};

fn write(c: &VdiCreate) -> FileSource {
    let blueprint = c.blueprint().expect("a possible image");
    let file = tempfile::tempfile().expect("temporary file");
    file.set_len(blueprint.file_len()).expect("length");
    for (at, bytes) in blueprint.clone().into_writes() {
        file.write_all_at(&bytes, at.0).expect("write");
    }
    FileSource(file)
}

fn opened(source: &FileSource) -> Box<dyn ImageMap> {
    open_single(Format::Vdi, source, FileId(0), OpenHow::default()).expect("opens")
}

fn create(size: u64) -> VdiCreate {
    VdiCreate::new(size, Uuid::from_u128(0xabc), Uuid::from_u128(0xdef))
}

#[test]
fn every_variant_opens_clean_and_empty() {
    let parent = Some(Parent { uuid: Uuid::from_u128(5), modification: Uuid::from_u128(6) });
    let cases = [
        ("dynamic", create(10 << 20)),
        ("dynamic", VdiCreate { block_bytes: 4096, ..create(512) }),
        ("dynamic", VdiCreate { block_bytes: 256 << 20, ..create(3 << 20) }),
        ("fixed", VdiCreate { variant: Variant::Fixed, ..create((3 << 20) + 512) }),
        ("zero-expand", VdiCreate { variant: Variant::ZeroExpand, ..create(5 << 20) }),
        (
            "diff",
            VdiCreate {
                parent,
                comment: "zweite Schicht äöü".into(),
                geometry: Some((3, 4, 5)),
                ..create(5 << 20)
            },
        ),
    ];
    for (variant, c) in cases {
        let source = write(&c);
        let map = opened(&source);
        assert!(vdi::check(&source).unwrap().is_clean(), "{variant}");
        let info = map.info();
        assert_eq!((info.variant, info.virtual_size), (variant, c.size_bytes));
        assert_eq!(info.block_size, Some(c.block_bytes));
        assert_eq!((info.uuid, info.modification_uuid), (Some(c.uuid), Some(c.modification)));
        assert_eq!(info.parent_uuid, c.parent.map(|p| p.uuid));
        assert_eq!(info.parent_modification_uuid, c.parent.map(|p| p.modification));
        assert_eq!(info.comment.unwrap_or_default(), c.comment);
        assert_eq!(info.geometry, c.geometry);
        let content = read_all(&[Layer { map: &*map, bytes: &source }]);
        assert!(content.iter().all(|b| *b == 0), "{variant}");
    }
}

#[test]
fn two_tebibytes_cost_a_table_of_eight_mebibytes() {
    let size = 2 << 40;
    let source = write(&create(size));
    let map = opened(&source);
    assert_eq!(map.limits().size_bytes, size);
    let all = GuestRange::between(GuestOffset(0), GuestOffset(size));
    let mut list = ExtentList::new();
    map.map(all, Intent::Read, &mut list).unwrap();
    assert_eq!(list.covered(), size);
    assert_eq!(list.as_slice().len(), 1);
    assert_eq!(list.as_slice()[0].kind, ExtentKind::Parent);
}
