//! Plug-ins, as the header of VirtualBox has them: formats and filters that are added at run time. [`crate::plugin`] does it, docs/plugins.md
//! tells how.

pub use crate::plugin::{
    PluginInfo, Scanned, plugin_info, plugin_load, plugin_load_dir, plugin_unload, plugin_unload_dir,
};
