//! Plug-ins: formats and filters that are added at run time, through the C interface of `include/vdblk_plugin.h`. docs/plugins.md tells
//! how they are written and used, and what is promised about them.
//!
//! A plug-in is a library whose code runs in this process, so nothing keeps one from doing harm on purpose. What is kept from doing harm is a
//! mistake: each answer is copied and judged (`judge.rs`) before anything is done about it.

pub mod abi;
mod calls;
mod elf;
mod filter;
mod image;
mod judge;
mod library;
mod registry;
mod text;
mod wish;

pub use registry::{
    PluginInfo, Scanned, is_plugin_name, plugin_info, plugin_load, plugin_load_dir, plugin_unload,
    plugin_unload_dir,
};
