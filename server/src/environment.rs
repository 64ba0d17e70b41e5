//! What the process's environment says: where caches lie, and where the GPU's compiler may.
//!
//! The only file that reads environment variables. Not here: what is kept there.

use kernels::cuda::Places;
use std::path::PathBuf;

/// `$XDG_CACHE_HOME/foretoken`, else `~/.cache/foretoken`; none where the environment names no place
/// for caches.
pub(crate) fn caches() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let home = || variable("HOME").map(|home| home.join(".cache"));
    Some(variable("XDG_CACHE_HOME").or_else(home)?.join("foretoken"))
}

/// Where the CUDA compiler may lie.
pub(crate) fn cuda_compiler() -> Places {
    Places::new(|name| std::env::var_os(name), std::env::current_exe().ok().as_deref())
}
