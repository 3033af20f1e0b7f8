//! Changes of what images say of themselves, interrupted.

use super::repairing::image_of;
use crate::format::{Properties, Property};
use crate::sim::{Kind, Rng, interrupted_properties};
use uuid::Uuid;

const SEEDS: u64 = if cfg!(debug_assertions) { 25 } else { 400 };

/// Some of the values that images of this kind have a place for, at least one.
fn wish(kind: Kind, rng: &mut Rng) -> Properties {
    let mut uuid = || Some(Uuid::from_u128(u128::from(rng.draw()) + 1));
    let uuids = [uuid(), uuid(), uuid(), uuid()];
    let geometry = |rng: &mut Rng| {
        let mut below = |n: u64| u32::try_from(1 + rng.below(n)).unwrap();
        Some((below(9999), below(255), below(63)))
    };
    let (physical, logical) = (geometry(rng), geometry(rng));
    let comment = "an image's comment, of which there is some. ".repeat(rng.index(6));
    let only = rng.index(9);
    let is = |property: Property| {
        let of_parent = [Property::ParentUuid, Property::ParentModificationUuid].contains(&property);
        let chosen = Property::ALL.get(only).is_none_or(|p| *p == property);
        let kept = kind.format().keeps(property) && (!of_parent || kind.has_parent());
        kept && (chosen || property == Property::Uuid)
    };
    Properties {
        uuid: uuids[0].filter(|_| is(Property::Uuid)),
        modification_uuid: uuids[1].filter(|_| is(Property::ModificationUuid)),
        parent_uuid: uuids[2].filter(|_| is(Property::ParentUuid)),
        parent_modification_uuid: uuids[3].filter(|_| is(Property::ParentModificationUuid)),
        comment: Some(comment).filter(|_| is(Property::Comment)),
        geometry: physical.filter(|_| is(Property::Geometry)),
        logical_geometry: logical.filter(|_| is(Property::LogicalGeometry)),
    }
}

fn changes(kind: Kind) {
    let mut states = 0;
    for seed in 0..SEEDS {
        let mut rng = Rng(seed);
        let size = 512 * (1 + rng.below(192));
        let images = image_of(kind, size, &mut rng);
        let new = wish(kind, &mut rng);
        states += interrupted_properties(&images, &images.top.bytes(), &new, 6, &mut rng)
            .unwrap_or_else(|e| panic!("{} seed {seed}, {new:?}: {e}", kind.name()));
    }
    println!("{}: {states} states", kind.name());
    assert!(states > 2 * SEEDS, "{states}");
}

#[test]
fn powercut_while_a_vdi_is_named() {
    [Kind::Vdi, Kind::DiffDiscard].into_iter().for_each(changes);
}

#[test]
fn powercut_while_a_vhd_is_named() {
    [Kind::Vhd, Kind::VhdDiff].into_iter().for_each(changes);
}

#[test]
fn powercut_while_a_vhdx_is_named() {
    [Kind::Vhdx, Kind::VhdxDiff].into_iter().for_each(changes);
}

#[test]
fn powercut_while_a_vmdk_is_named() {
    [Kind::Vmdk, Kind::VmdkDiff, Kind::VmdkZeroed].into_iter().for_each(changes);
}
