//! What is done to media and their files together.

use super::absolute;
use super::check::{Facts, Question, as_error, format_named};
use super::code::{Code, Fault, Result};
use super::encryption;
use super::handle::{Medium, with_extension};
use super::intent::{self, Doomed, Intent, Link};
use super::kinds::{MediumType, TypeFacts, allow_type, device_title};
use super::record::{self, Attachment, Record};
use super::staging::{Staging, folder_of};
use super::state::{Call, Client, Phase, Standing};
use super::store::{
    Registry, call_in, chain_of, lock_all_in, registered_parent, said, set_intent, unlock_all_in,
};
use crate::error::ErrorKind;
use crate::format::{Format, NewParent};
use crate::io::HostFile;
use crate::job::{
    self, Convert, CreateImage, NewSize, Watch, compact_image, create_image, merge_images, named_from,
};
use crate::map::{DeviceType, ImageInfo};
use crate::vd::{
    CacheMode, DiskOptions, ImageFiles, ImageSpec, OpenDisk, Sought, any_other_child, open_disk, stand_in,
};
use rusqlite::Connection;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

/// A file that is to become a known medium.
#[derive(Clone, Debug, Default)]
pub struct OpenMedium {
    /// Where it is.
    pub location: PathBuf,
    /// Its format; `None`: what it says.
    pub format: Option<Format>,
    /// What it is a medium for; `None`: what it says.
    pub device: Option<DeviceType>,
    /// Its parent, where the image does not say.
    pub parent: Option<Uuid>,
    /// Its type; `None`: that of its device.
    pub medium_type: Option<MediumType>,
    /// A text.
    pub description: Option<String>,
}

/// A hard disk that is to be made.
#[derive(Clone, Debug)]
pub struct NewMedium {
    /// Where; without an extension it gets that of the format.
    pub location: PathBuf,
    /// Its format.
    pub format: Format,
    /// Bytes of its disk; `None`: the parent's.
    pub size_bytes: Option<u64>,
    /// Variant of the format.
    pub variant: Option<String>,
    /// What it is a diff of.
    pub parent: Option<Uuid>,
    /// A text.
    pub description: Option<String>,
    /// It is made anew at every start; only diffs are.
    pub auto_reset: bool,
}

/// How to open a medium with what the registry knows of its chain.
pub(super) fn disk_of(chain: &[Record], lock_wait: Option<Duration>) -> OpenDisk {
    let spec = |r: &Record| ImageSpec { path: r.location.clone(), format: format_named(&r.format) };
    OpenDisk {
        image: spec(&chain[0]),
        parents: chain[1..].iter().rev().map(spec).collect(),
        lock_wait,
        options: DiskOptions { read_only: true, ..DiskOptions::default() },
        ..OpenDisk::new("")
    }
}

fn ids(chain: &[Record]) -> Vec<Uuid> {
    chain.iter().map(|r| r.id).collect()
}

fn taken(db: &Connection, path: &Path, device: DeviceType) -> Result<Option<Record>> {
    Ok(record::at_location(db, path)?.into_iter().find(|r| r.device == device))
}

impl Registry {
    /// Makes a file a known medium; its parents too, where they can be found. One that is known already is returned as it is.
    ///
    /// # Errors
    /// [`Code::FileError`] if it cannot be read; [`Code::ObjectNotFound`] where its parent is not known and was not found;
    /// [`Code::InvalidArg`] if another medium has its UUID.
    pub fn open_medium(&self, how: &OpenMedium) -> Result<Medium<'_>> {
        self.open_below(how, 0)
    }

    fn open_below(&self, how: &OpenMedium, depth: usize) -> Result<Medium<'_>> {
        let path = absolute(&how.location);
        record::text_of(&path)?;
        let known = self.read(|db, _| record::at_location(db, &path))?;
        if let Some(r) = known.iter().find(|r| how.device.is_none_or(|d| d == r.device)) {
            return Ok(Medium::new(self, r.id));
        }
        let q = Question { path: path.clone(), format: how.format, find_parent: true };
        let facts = self.ask(&q).map_err(|why| Fault::because(Code::FileError, as_error(why, &path)))?;
        let parent = match how.parent {
            Some(p) => Some(p),
            None if facts.is_diff => Some(self.parent_for(&path, &facts, depth)?),
            None => None,
        };
        let device = how.device.unwrap_or(facts.device());
        let mut new = Record {
            parent,
            description: how.description.clone(),
            medium_type: how.medium_type.unwrap_or(MediumType::of_new(device)),
            phase: Phase::Created,
            ..Record::new(facts.uuid().unwrap_or_else(Uuid::new_v4), device, &facts.format, &path)
        };
        (new.size, new.logical_size) = (facts.size, facts.logical_size);
        new.variant.clone_from(&facts.variant);
        let id = self.write(|db| insert_new(db, &new))?;
        Ok(Medium::new(self, id))
    }

    /// The registered parent of a diff; found ones become known.
    fn parent_for(&self, path: &Path, facts: &Facts, depth: usize) -> Result<Uuid> {
        if let Some(id) = self.read(|db, _| registered_parent(db, facts))? {
            return Ok(id);
        }
        let Some(parent) = facts.parent_path.as_ref().filter(|_| depth < crate::limits::MAX_CHAIN_IMAGES)
        else {
            let named = facts.parent_uuid().map_or_else(String::new, |u| format!(" with UUID {{{u}}}"));
            let what = format!("its parent medium{named} is not found in the media registry");
            return Err(Fault::new(Code::ObjectNotFound, what).at(path).hint("add the parent first"));
        };
        let how = OpenMedium { location: parent.clone(), ..OpenMedium::default() };
        Ok(self.open_below(&how, depth + 1)?.id())
    }

    /// Makes a hard disk, base or diff, and makes it known. While it is made its parents are locked for reading.
    ///
    /// # Errors
    /// [`Code::InvalidObjectState`] where the parent's type or state forbids it; [`Code::ObjectInUse`] where a machine's current
    /// state uses the parent; of making the image. Nothing is left of it then.
    pub fn create(&self, new: &NewMedium) -> Result<Medium<'_>> {
        let target = absolute(&with_extension(&new.location, DeviceType::HardDisk, new.format.name()));
        if new.auto_reset && new.parent.is_none() {
            return Err(Fault::new(Code::NotSupported, "only a differencing image is reset").at(&target));
        }
        let chain = new.parent.map_or_else(|| Ok(Vec::new()), |p| self.chain(p))?;
        let mut r = Record::new(Uuid::new_v4(), DeviceType::HardDisk, new.format.name(), &target);
        (r.parent, r.description, r.auto_reset) = (new.parent, new.description.clone(), new.auto_reset);
        self.build(r, &ids(&chain), |r, staging| {
            let made = describe_new(new, r.id, staging, &chain)?;
            create_image(&made)?;
            Ok(r.id)
        })
    }

    /// Copies what a medium shows into a new base image, and makes it known. The source's chain is locked for reading.
    ///
    /// # Errors
    /// As [`Self::create`]; [`ErrorKind::Cancelled`] inside.
    pub fn clone_medium(&self, source: Uuid, new: &NewMedium, watch: &mut Watch<'_>) -> Result<Medium<'_>> {
        let chain = self.chain(source)?;
        let target = absolute(&with_extension(&new.location, DeviceType::HardDisk, new.format.name()));
        let mut r = Record::new(Uuid::new_v4(), DeviceType::HardDisk, new.format.name(), &target);
        r.description.clone_from(&new.description);
        // What is copied is what the images hold.
        r.properties.extend(encryption::properties_of(&chain[chain.len() - 1]));
        self.build(r, &ids(&chain), |r, staging| {
            let how = Convert {
                source: disk_of(&chain, Some(Duration::ZERO)),
                target: staging.main(),
                format: new.format,
                variant: new.variant.clone(),
                options: Vec::new(),
                filters: Default::default(),
                cache: CacheMode::Writeback,
            };
            job::convert(&how, watch)?;
            let seen = job::inspect_image(&ImageSpec { path: staging.main(), format: Some(new.format) })?;
            Ok(seen.info.uuid.unwrap_or(r.id))
        })
    }

    /// From NotCreated by Creating to Created, or back. `make` makes the files and says which UUID the image has.
    fn build(
        &self,
        mut r: Record,
        parents: &[Uuid],
        make: impl FnOnce(&Record, &Staging) -> crate::Result<Uuid>,
    ) -> Result<Medium<'_>> {
        let staging = Staging::planned(&r.location);
        if fs::symlink_metadata(staging.target()).is_ok() {
            let e = crate::Error::new(ErrorKind::Exists, "is there already").at(staging.target());
            return Err(Fault::because(
                Code::FileError,
                e.hint("nothing is overwritten: choose another name"),
            ));
        }
        let (dir, target) = (staging.dir().to_path_buf(), staging.target().to_path_buf());
        let plan =
            |id: Uuid| Intent::Create { medium: id.to_string(), dir: dir.clone(), target: target.clone() };
        let first = plan(r.id);
        let begun = self.write_as(|db, client| begin_create(db, client, &mut r, parents, &first))?;
        let made = staging.begin().and_then(|()| make(&r, &staging)).map_err(Fault::from).and_then(|uuid| {
            if uuid != r.id {
                let (old, new) = (r.id, Record { id: uuid, ..r.clone() });
                self.write(|db| rename_new(db, old, &new, begun, &plan(uuid)))?;
                r.id = uuid;
            }
            Ok(staging.publish()?)
        });
        // the format that was asked for: the name of a raw image need not say it
        let spec = ImageSpec { path: target.clone(), format: format_named(&r.format) };
        let seen = made.and_then(|()| Ok(job::inspect_image(&spec)?));
        let seen = match seen {
            Ok(seen) => seen,
            Err(e) => {
                staging.take_back();
                let cleared = staging.clear();
                self.write_as(|db, client| {
                    unlock_all_in(db, client, parents, false)?;
                    record::remove(db, r.id)?;
                    intent::end(db, begun)
                })?;
                cleared?;
                return Err(e);
            }
        };
        let rest = Intent::Remove { media: Vec::new(), files: Vec::new(), dir: Some(dir.clone()) };
        self.write_as(|db, client| {
            said(&r, call_in(db, client, r.id, &Call::EndCreate(true), None)?)?;
            let mut now = Self::known(db, r.id)?;
            (now.size, now.logical_size) = (seen.file_size, seen.info.virtual_size);
            now.variant = seen.info.variant.into();
            record::save(db, &now)?;
            unlock_all_in(db, client, parents, false)?;
            set_intent(db, r.id, None)?;
            intent::change(db, begun, &rest)
        })?;
        staging.clear()?;
        self.write(|db| intent::end(db, begun))?;
        Ok(Medium::new(self, r.id))
    }

    /// Removes a hard disk's files and forgets it.
    ///
    /// # Errors
    /// As [`Medium::close`]; [`Code::NotSupported`] for DVDs, floppies, and formats that are only read; where the files cannot be
    /// removed it stays what it was.
    pub fn delete(&self, id: Uuid) -> Result<()> {
        let r = self.read(|db, _| Self::known(db, id))?;
        let mut none = Standing { phase: r.phase, ..Standing::new(r.device) };
        // What is refused whatever its file is like is refused before that is looked at.
        said(&r, none.call(Client(0), &Call::BeginDelete))?;
        let image = ImageFiles::open(&r.location, format_named(&r.format), true, Some(Duration::ZERO))?;
        if !image.format().can_be_created() {
            let why = format!("{} images are not deleted here: close it", image.format());
            return Err(Fault::new(Code::NotSupported, why).at(&r.location));
        }
        refuse_unknown_child(&r)?;
        let files: Vec<_> = image.files().iter().filter_map(|f| Doomed::now(f.path())).collect();
        let plan = Intent::Remove { media: vec![id.to_string()], files: files.clone(), dir: None };
        let begun = self.write_as(|db, client| {
            said(&r, call_in(db, client, id, &Call::BeginDelete, None)?)?;
            let begun = intent::begin(db, client, &plan)?;
            set_intent(db, id, Some(begun))?;
            Ok(begun)
        })?;
        if let Err(e) = intent::remove_files(&files) {
            let main_is_there = fs::symlink_metadata(&r.location).is_ok();
            self.write_as(|db, client| {
                call_in(db, client, id, &Call::EndDelete(!main_is_there), None)?;
                if !main_is_there {
                    record::remove(db, id)?;
                }
                intent::end(db, begun)
            })?;
            return Err(e.into());
        }
        self.write(|db| {
            record::remove(db, id)?;
            intent::end(db, begun)
        })
    }

    /// Moves a medium's files and its record. It is locked for writing meanwhile. Children whose format names its file, not its UUID, are
    /// found by the registry alone afterwards.
    ///
    /// # Errors
    /// [`Code::InvalidObjectState`] while it is locked; [`Code::FileError`] where something is at the new place; of the files;
    /// [`Code::NotSupported`] for links and devices.
    pub fn move_to(&self, id: Uuid, to: &Path, watch: &mut Watch<'_>) -> Result<()> {
        let r = self.read(|db, _| Self::known(db, id))?;
        let to = if to.is_dir() { to.join(r.name()) } else { with_extension(to, r.device, &r.format) };
        let target = absolute(&to);
        self.lock_all(&[id], true)?;
        let moved = self.move_locked(&r, &target, watch);
        let unlocked = self.unlock_all(&[id], true);
        moved.and(unlocked)
    }

    fn move_locked(&self, r: &Record, target: &Path, watch: &mut Watch<'_>) -> Result<()> {
        let image = ImageFiles::open(&r.location, format_named(&r.format), true, Some(Duration::ZERO));
        // DVDs are only read.
        let image = image.or_else(|e| match r.device {
            DeviceType::HardDisk => Err(e),
            _ => ImageFiles::open(&r.location, format_named(&r.format), false, Some(Duration::ZERO)),
        })?;
        let staging = Staging::planned(target);
        let moving = moving(&image, target)?;
        let old: Vec<_> = moving.iter().filter_map(|(from, _)| Doomed::now(from.path())).collect();
        let plan = Intent::Move {
            medium: r.id.to_string(),
            dir: staging.dir().to_path_buf(),
            target: target.to_path_buf(),
            old: old.clone(),
        };
        let begun = self.write_as(|db, client| {
            if taken(db, target, r.device)?.is_some() {
                return Err(Fault::new(Code::InvalidArg, "is the location of another medium").at(target));
            }
            intent::begin(db, client, &plan)
        })?;
        let gathered = staging.begin().and_then(|()| gather(&moving, &staging, watch));
        let put = gathered.and_then(|()| staging.publish());
        if let Err(e) = put {
            staging.take_back();
            let cleared = staging.clear();
            self.write(|db| intent::end(db, begun))?;
            cleared?;
            return Err(e.into());
        }
        let dir = Some(staging.dir().to_path_buf());
        let rest = Intent::Remove { media: Vec::new(), files: old.clone(), dir };
        self.write(|db| {
            let mut now = Self::known(db, r.id)?;
            now.location = target.to_path_buf();
            record::save(db, &now)?;
            intent::change(db, begun, &rest)
        })?;
        intent::remove_files(&old)?;
        staging.clear()?;
        self.write(|db| intent::end(db, begun))
    }

    /// Makes a diff anew: it shows what its parent does, and keeps UUID and place.
    ///
    /// # Errors
    /// [`Code::NotSupported`] for what is no diff; [`Code::ObjectInUse`] with children; [`Code::InvalidObjectState`] while it, or
    /// what is beneath it, is locked.
    pub fn reset(&self, id: Uuid) -> Result<()> {
        let chain = self.chain(id)?;
        self.allow_reset(&chain)?;
        self.lock_all(&ids(&chain), true)?;
        let done = self.reset_locked(&chain);
        let unlocked = self.unlock_all(&ids(&chain), true);
        done.and(unlocked)
    }

    pub(super) fn allow_reset(&self, chain: &[Record]) -> Result<()> {
        let r = &chain[0];
        if r.parent.is_none() {
            return Err(Fault::new(Code::NotSupported, "only a differencing image is reset").at(&r.location));
        }
        if self.read(|db, _| Ok(!record::children(db, r.id)?.is_empty()))? {
            return Err(Fault::new(Code::ObjectInUse, "has children: it cannot be reset").at(&r.location));
        }
        Ok(())
    }

    /// We hold it for writing, and its parents for reading.
    pub(super) fn reset_locked(&self, chain: &[Record]) -> Result<()> {
        let r = &chain[0];
        let image = ImageFiles::open(&r.location, format_named(&r.format), true, Some(Duration::ZERO))?;
        if image.files().len() > 1 || !image.format().can_be_created() {
            return Err(Fault::new(Code::NotSupported, "images of this kind are not reset").at(&r.location));
        }
        let staging = Staging::planned(&r.location);
        let dir = Some(staging.dir().to_path_buf());
        let plan = Intent::Remove { media: Vec::new(), files: Vec::new(), dir };
        let begun = self.write_as(|db, client| intent::begin(db, client, &plan))?;
        let new = NewMedium {
            location: r.location.clone(),
            format: image.format(),
            size_bytes: None,
            variant: None,
            parent: r.parent,
            description: None,
            auto_reset: true,
        };
        let made = staging.begin().and_then(|()| {
            let new = describe_new(&new, r.id, &staging, &chain[1..])?;
            create_image(&CreateImage { size_bytes: new.size_bytes.max(r.logical_size), ..new })?;
            staging.replace()
        });
        let cleared = staging.clear();
        self.write(|db| intent::end(db, begun))?;
        Ok(made.and(cleared)?)
    }

    /// Changes the size of its disk, under locks; children would show what is added, or lose what goes. Tells the sizes before and after, in bytes.
    ///
    /// # Errors
    /// [`Code::ObjectInUse`] with children; as [`job::resize_image`]; of the locks.
    pub fn resize(&self, id: Uuid, size: NewSize, shrink: bool, watch: &mut Watch<'_>) -> Result<(u64, u64)> {
        let r = self.read(|db, _| Self::known(db, id))?;
        if self.read(|db, _| Ok(!record::children(db, id)?.is_empty()))? {
            return Err(Fault::new(Code::ObjectInUse, "has children: its size stays").at(&r.location));
        }
        self.with_chain_locked(id, |chain| {
            let image = disk_of(chain, Some(Duration::ZERO));
            Ok(job::resize_image(&job::Resize { image, size, shrink }, watch)?)
        })
    }

    /// Takes from its file what need not be kept, under locks.
    ///
    /// # Errors
    /// As [`compact_image`]; of the locks.
    pub fn compact(&self, id: Uuid, watch: &mut Watch<'_>) -> Result<job::Compacted> {
        self.with_chain_locked(id, |chain| Ok(compact_image(&disk_of(chain, Some(Duration::ZERO)), watch)?))
    }

    /// The medium locked for writing and what is beneath it for reading: all or none; looked at afterwards.
    fn with_chain_locked<T>(&self, id: Uuid, f: impl FnOnce(&[Record]) -> Result<T>) -> Result<T> {
        let chain = self.chain(id)?;
        self.lock_all(&ids(&chain), true)?;
        let done = f(&chain);
        let unlocked = self.unlock_all(&ids(&chain), true);
        let done = done?;
        unlocked?;
        self.check(&[id])?;
        Ok(done)
    }

    /// Attaches a medium to a machine. Of one that machines use through diffs a diff is made, beside it in `Snapshots`, and attached.
    /// Returns what is attached.
    ///
    /// # Errors
    /// As [`Medium::attach`] and [`Self::create`].
    pub fn attach(&self, id: Uuid, machine: Uuid, snapshot: Option<Uuid>) -> Result<Medium<'_>> {
        let r = self.read(|db, _| Self::known(db, id))?;
        if !r.medium_type.is_indirect() || snapshot.is_some() {
            self.attach_record(id, &Attachment { machine, snapshot, place: None })?;
            return Ok(Medium::new(self, id));
        }
        let diff = self.create(&indirect_diff(&r))?;
        diff.attach(machine, None)?;
        Ok(diff)
    }

    /// Merges a medium, with those between, into another of its chain, beneath it or above, and removes what is not needed any more.
    ///
    /// # Errors
    /// [`Code::InvalidArg`] where one is not above the other; [`Code::ObjectInUse`] where machines or other children use what would
    /// go or change; [`Code::InvalidObjectState`] for locks and types that forbid it; as [`merge_images`].
    pub fn merge(&self, source: Uuid, into: Uuid, watch: &mut Watch<'_>) -> Result<()> {
        let plan = self.plan_merge(source, into)?;
        let how = job::Merge {
            chain: disk_of(&plan.chain, Some(Duration::ZERO)),
            from: Some(plan.location(source)),
            into: Some(plan.location(into)),
            keep: true,
        };
        let begun = self.write_as(|db, client| plan.begin(db, client))?;
        let done = merge_images(&how, watch);
        let rest = self.write_as(|db, client| plan.end(db, client, begun, done.is_ok()))?;
        if let Some(Intent::Remove { files, media, .. }) = rest {
            intent::remove_files(&files)?;
            self.write(|db| {
                media.iter().try_for_each(|m| record::remove(db, intent::uuid(m)?))?;
                intent::end(db, begun)
            })?;
        }
        done?;
        self.check(&[into]).map(drop)
    }

    fn plan_merge(&self, source: Uuid, into: Uuid) -> Result<MergePlan> {
        let refused = |why: &str| Err(Fault::new(Code::InvalidArg, why));
        let (up, down) = (self.chain(into)?, self.chain(source)?);
        let is_down = down.iter().skip(1).any(|r| r.id == into);
        if !is_down && !up.iter().skip(1).any(|r| r.id == source) {
            return refused("the two media are not in one chain");
        }
        let mut chain = if is_down { down } else { up };
        let position = |chain: &[Record], id| chain.iter().position(|r| r.id == id).unwrap_or_default();
        if is_down {
            // The one child of the source, if there is one, gets another parent.
            let children = self.read(|db, _| record::children(db, source))?;
            match &children[..] {
                [] => {}
                [one] => chain.insert(0, one.clone()),
                _ => return Err(Fault::new(Code::ObjectInUse, "has several children").at(&chain[0].location)),
            }
        }
        let (s, t) = (position(&chain, source), position(&chain, into));
        let spent: Vec<_> = if is_down { (s..t).collect() } else { (t + 1..=s).collect() };
        let changed = if is_down { t } else { s };
        if chain[changed].medium_type.is_indirect() {
            let why = format!("is {}: it may not change or go", chain[changed].medium_type);
            return Err(Fault::new(Code::InvalidObjectState, why).at(&chain[changed].location));
        }
        if is_down && self.read(|db, _| Ok(record::children(db, into)?.len()))? > 1 {
            return Err(Fault::new(Code::ObjectInUse, "has other children").at(&chain[t].location));
        }
        let child = if is_down { s.checked_sub(1) } else { Some(t) };
        let parent = if is_down { chain.get(t) } else { chain.get(s + 1) };
        let link = child.map(|c| Link {
            child: chain[c].id.to_string(),
            file: chain[c].location.clone(),
            parent: parent.map(|p| p.id.to_string()),
            parent_file: parent.map(|p| p.location.clone()),
        });
        let mut files = Vec::new();
        for n in &spent {
            let image = ImageFiles::open(&chain[*n].location, format_named(&chain[*n].format), false, None)?;
            files.extend(image.files().iter().filter_map(|f| Doomed::now(f.path())));
        }
        Ok(MergePlan { into: t, chain, spent, link, child, files })
    }
}

/// A merge, by numbers in its chain.
struct MergePlan {
    /// The top first.
    chain: Vec<Record>,
    spent: Vec<usize>,
    into: usize,
    /// Gets another parent.
    child: Option<usize>,
    link: Option<Link>,
    files: Vec<Doomed>,
}

impl MergePlan {
    fn location(&self, id: Uuid) -> PathBuf {
        self.chain.iter().find(|r| r.id == id).map_or_else(PathBuf::new, |r| r.location.clone())
    }

    fn written(&self) -> impl Iterator<Item = usize> {
        self.child.filter(|c| *c != self.into).into_iter().chain([self.into])
    }

    fn read(&self) -> impl Iterator<Item = usize> {
        let is_written: Vec<_> = self.written().collect();
        (0..self.chain.len()).filter(move |n| !is_written.contains(n) && !self.spent.contains(n))
    }

    /// All locks, or none.
    fn begin(&self, db: &Connection, client: Client) -> Result<i64> {
        let media: Vec<_> = self.spent.iter().map(|n| self.chain[*n].id.to_string()).collect();
        let intent = Intent::Merge { media, child: self.link.clone(), files: self.files.clone() };
        let begun = intent::begin(db, client, &intent)?;
        for (n, r) in self.chain.iter().enumerate().rev() {
            let call = match n {
                _ if self.spent.contains(&n) => Call::BeginMerge,
                _ if self.written().any(|w| w == n) => Call::LockWrite,
                _ => Call::LockRead,
            };
            said(r, call_in(db, client, r.id, &call, None)?)?;
            if call == Call::BeginMerge {
                set_intent(db, r.id, Some(begun))?;
            }
        }
        Ok(begun)
    }

    /// What is left to do.
    fn end(&self, db: &Connection, client: Client, begun: i64, done: bool) -> Result<Option<Intent>> {
        for n in self.written() {
            said(&self.chain[n], call_in(db, client, self.chain[n].id, &Call::UnlockWrite, None)?)?;
        }
        for n in self.read() {
            said(&self.chain[n], call_in(db, client, self.chain[n].id, &Call::UnlockRead, None)?)?;
        }
        let media: Vec<_> = self.spent.iter().map(|n| self.chain[*n].id.to_string()).collect();
        // After an error the files may have come as far as to do without them all the same.
        if !done && !self.link.as_ref().is_some_and(Link::is_made) {
            for n in &self.spent {
                call_in(db, client, self.chain[*n].id, &Call::EndDelete(false), None)?;
            }
            intent::end(db, begun)?;
            return Ok(None);
        }
        let rest = intent::merged(db, &media, self.link.as_ref(), &self.files)?;
        intent::change(db, begun, &rest)?;
        Ok(Some(rest))
    }
}

/// A diff that no registry knows would be lost with its parent.
fn refuse_unknown_child(r: &Record) -> Result<()> {
    let path = &*r.location;
    let spec = ImageSpec { path: path.to_path_buf(), format: format_named(&r.format) };
    let info = job::inspect_image(&spec)?.info;
    let named = info.uuid.or_else(|| stand_in(path));
    match any_other_child(&[Sought { path, own: info.uuid, named }], &[]) {
        None => Ok(()),
        Some((_, child)) => {
            let why =
                format!("is the parent of {}, which is not known: it cannot be deleted", child.display());
            Err(Fault::new(Code::ObjectInUse, why).at(path))
        }
    }
}

/// The diff that a machine gets of a medium that it does not use directly.
pub(super) fn indirect_diff(base: &Record) -> NewMedium {
    let name = format!("{}.vdi", Uuid::new_v4().braced());
    NewMedium {
        location: folder_of(&base.location).join("Snapshots").join(name),
        format: Format::Vdi,
        size_bytes: None,
        variant: None,
        parent: Some(base.id),
        description: None,
        auto_reset: base.medium_type == MediumType::Immutable,
    }
}

/// Registers an image that is there, unless that has been done meanwhile.
pub(super) fn insert_new(db: &Connection, new: &Record) -> Result<Uuid> {
    if let Some(r) = taken(db, &new.location, new.device)? {
        return Ok(r.id);
    }
    if let Some(other) = record::find(db, new.id)? {
        let (what, id) = (device_title(new.device), new.id);
        let (path, others) = (new.location.display(), other.location.display());
        let why = format!(
            "Cannot register the {what} '{path}' {{{id}}} because a {what} '{others}' with UUID {{{id}}} already exists"
        );
        return Err(Fault::new(Code::InvalidArg, why));
    }
    let facts = TypeFacts {
        device: new.device,
        old: MediumType::of_new(new.device),
        is_diff: new.parent.is_some(),
        is_fixed: new.variant == "fixed" || format_named(&new.format) == Some(Format::Raw),
        ..TypeFacts::default()
    };
    allow_type(facts, new.medium_type).map_err(|e| e.at(&new.location))?;
    if let Some(parent) = new.parent {
        Registry::known(db, parent)?.medium_type.allow_diff().map_err(|e| e.at(&new.location))?;
        if chain_of(db, parent)?.len() >= crate::limits::MAX_CHAIN_IMAGES {
            return Err(Fault::new(Code::InvalidObjectState, "its chain is too long").at(&new.location));
        }
    }
    record::save(db, new)?;
    Ok(new.id)
}

/// NotCreated becomes Creating, and the parents LockedRead.
fn begin_create(
    db: &Connection,
    client: Client,
    r: &mut Record,
    parents: &[Uuid],
    intent: &Intent,
) -> Result<i64> {
    if taken(db, &r.location, r.device)?.is_some() {
        return Err(Fault::new(Code::InvalidArg, "is the location of another medium").at(&r.location));
    }
    if let Some(parent) = r.parent {
        let parent = Registry::known(db, parent)?;
        parent.medium_type.allow_diff().map_err(|e| e.at(&parent.location))?;
        if record::attachments(db, parent.id)?.iter().any(|a| a.snapshot.is_none()) {
            let why = "is used by the current state of a machine: no differencing image can be made over it";
            return Err(Fault::new(Code::ObjectInUse, why).at(&parent.location));
        }
    }
    lock_all_in(db, client, parents, false)?;
    let mut standing = Standing { phase: Phase::NotCreated, ..Standing::new(r.device) };
    said(r, standing.call(client, &Call::BeginCreate))?;
    r.phase = standing.phase;
    record::save(db, r)?;
    let begun = intent::begin(db, client, intent)?;
    set_intent(db, r.id, Some(begun))?;
    Ok(begun)
}

/// While it is made its UUID is not known; now it is.
fn rename_new(db: &Connection, old: Uuid, new: &Record, begun: i64, plan: &Intent) -> Result<()> {
    record::remove(db, old)?;
    record::save(db, new)?;
    set_intent(db, new.id, Some(begun))?;
    intent::change(db, begun, plan)
}

/// The image that is to be made in its staging folder.
fn describe_new(
    new: &NewMedium,
    id: Uuid,
    staging: &Staging,
    chain: &[Record],
) -> crate::Result<CreateImage> {
    let parent = match chain {
        [] => None,
        chain => {
            let opened = open_disk(&disk_of(chain, Some(Duration::ZERO)))?;
            let image = &opened.images[0];
            Some(ImageInfo { uuid: image.uuid(), ..image.info.clone() })
        }
    };
    let Some(size_bytes) = new.size_bytes.or(parent.as_ref().map(|p| p.virtual_size)) else {
        return Err(crate::Error::new(ErrorKind::InvalidArgument, "no size was given").at(&new.location));
    };
    let geometry = parent.as_ref().filter(|p| p.virtual_size == size_bytes).and_then(|p| p.geometry);
    let path = chain.first().and_then(|p| named_from(staging.target(), &p.location));
    let named_by_uuid = matches!(new.format, Format::Vdi | Format::Vhd | Format::Vmdk | Format::Vhdx);
    Ok(CreateImage {
        variant: new.variant.clone(),
        uuid: named_by_uuid.then_some(id),
        parent: parent.map(|info| NewParent { info, path }),
        geometry: new.format.geometry_from(geometry),
        ..CreateImage::new(staging.main(), new.format, size_bytes)
    })
}

/// The files of an image that get other names, and which: the main file first. Parts keep theirs, which the main file has.
fn moving<'a>(image: &'a ImageFiles, target: &Path) -> crate::Result<Vec<(&'a dyn HostFile, PathBuf)>> {
    let main = image.files()[0].path();
    let mut all: Vec<(&dyn HostFile, _)> = vec![(&*image.files()[0], target.to_path_buf())];
    for part in &image.files()[1..] {
        let own = part.path();
        if own.parent().map(absolute) != main.parent().map(absolute) {
            let what = "has a part in another folder, and cannot be moved";
            return Err(crate::Error::new(ErrorKind::Unsupported, what).at(own));
        }
        let to = folder_of(target).join(own.file_name().unwrap_or_default());
        if absolute(own) != to {
            all.push((&**part, to));
        }
    }
    for (file, _) in &all {
        // a link would be moved in place of what it names, and then perhaps name nothing
        if !fs::symlink_metadata(file.path()).is_ok_and(|m| m.is_file()) {
            let what = "is a link or a device, and is not moved";
            return Err(crate::Error::new(ErrorKind::Unsupported, what)
                .at(file.path())
                .hint("vdimg medium set-location changes the record"));
        }
    }
    Ok(all)
}

/// Files under a staging folder, with the names they shall have: by hard links, or copied where they come from another file system.
fn gather(
    moving: &[(&dyn HostFile, PathBuf)],
    staging: &Staging,
    watch: &mut Watch<'_>,
) -> crate::Result<()> {
    moving.iter().try_for_each(|(file, to)| {
        job::link_or_copy(*file, &staging.dir().join(to.file_name().unwrap_or_default()), watch)
    })
}
