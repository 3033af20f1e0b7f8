//! Disks that are known by more than their file: media of a registry, disks of VirtualBox's machines.

use clap::Args;
use std::path::PathBuf;
use uuid::Uuid;
use vdblk::daemon::{self, Config, Socket};
use vdblk::filter::KeySource;
use vdblk::medium::{Registry, ServeMedium, machine_disk, system_registry, user_registry};
use vdblk::{Error, ErrorKind, Result};

/// What may stand in place of `--blk-file`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Known {
    /// Serve a known medium (vdimg medium lists them) with its chain: LockedWrite, what is beneath it LockedRead, as long as it is
    /// served. Of an immutable or multiattach one a diff takes the writes; a readonly one takes none
    #[arg(long, value_name = "UUID|FILE", group = "key_source", conflicts_with_all = ["blk_file", "vbox", "format", "parent", "parent_dir", "overlay", "snapshot"])]
    medium: Option<String>,
    /// The machine that a medium is served for: it has its own diff of an immutable or multiattach one
    #[arg(long, value_name = "UUID", requires = "medium")]
    machine: Option<Uuid>,
    /// The registry of media [default: this user's, $XDG_DATA_HOME/vdblk/media.sqlite]
    #[arg(long, value_name = "FILE", requires = "medium")]
    registry: Option<PathBuf>,
    /// The registry of the whole system, /var/lib/vdblk/media.sqlite
    #[arg(long, requires = "medium", conflicts_with = "registry")]
    system_registry: bool,
    /// Serve a disk of a VirtualBox machine's current state with its chain, as its .vbox says; no registry is used
    #[arg(long, value_name = "FILE", group = "key_source", conflicts_with_all = ["blk_file", "format", "parent", "parent_dir", "snapshot"])]
    vbox: Option<PathBuf>,
    /// Which of the machine's hard disks, from 0, in the order of its controllers
    #[arg(long, value_name = "N", requires = "vbox", default_value_t = 0)]
    disk: usize,
}

impl Known {
    /// Finds the disk, holds it, and serves it.
    pub(crate) fn serve(self, mut config: Config) -> Result<()> {
        if let Some(file) = &self.vbox {
            let disk = machine_disk(file, self.disk)?;
            (config.image, config.parents) = (disk.image, disk.parents);
            use_keys(&mut config, disk.keys)?;
        }
        let Some(medium) = self.medium else { return daemon::run(&config) };
        let path = match self.registry {
            Some(path) => path,
            None if self.system_registry => system_registry(),
            None => user_registry()?,
        };
        let registry = Registry::open(&path)?;
        let served = registry.serve(&ServeMedium {
            medium,
            machine: self.machine,
            name: name_of(&config.socket),
            read_only: config.read_only,
            lock_wait: config.lock_wait,
        })?;
        config.image = served.image.clone();
        config.parents.clone_from(&served.parents);
        config.read_only = served.read_only;
        use_keys(&mut config, served.keys.clone())?;
        tracing::info!("medium {}", served.id());
        let done = daemon::run(&config);
        drop(served);
        done
    }
}

/// The key store that was found for the disk, unless another one was named.
fn use_keys(config: &mut Config, found: Option<KeySource>) -> Result<()> {
    if found.is_some() && config.keys.password.is_none() {
        return Err(Error::new(ErrorKind::InvalidArgument, "is encrypted, and no password was given")
            .at(&config.image.path)
            .hint("pass --password-file FILE"));
    }
    config.keys.key_store = config.keys.key_store.take().or(found);
    Ok(())
}

/// Where front-ends reach us, as a name that is the same after a restart.
fn name_of(socket: &Socket) -> String {
    match socket {
        Socket::Path { path, .. } => {
            std::path::absolute(path).unwrap_or_else(|_| path.clone()).display().to_string()
        }
        Socket::Inherited(_) | Socket::Activated => String::from("a socket that was handed over"),
    }
}
