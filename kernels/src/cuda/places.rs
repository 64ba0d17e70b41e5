//! Where the compiler's library may lie: `libnvrtc` 12 or 13, as people have it installed.
//!
//! The environment comes in as a function, so that only the server reads it. Not here: opening the
//! library ([`super::nvrtc`]).

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Variable that names the library, or the folder it lies in.
pub const VARIABLE: &str = "FORETOKEN_NVRTC";

/// Files to try in a folder, first one first.
#[cfg(windows)]
pub(super) const FILES: [&str; 2] = ["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"];
/// Files to try in a folder, first one first.
#[cfg(not(windows))]
pub(super) const FILES: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so.12"];

/// Folders of libraries in a toolkit's.
const TOOLKIT: [&str; 6] =
    ["lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib", "bin/x64", "bin"];
/// Folders of libraries in a Python installation's packages.
const WHEELS: [&str; 4] =
    ["nvidia/cu13/lib", "nvidia/cu13/bin/x86_64", "nvidia/cuda_nvrtc/lib", "nvidia/cuda_nvrtc/bin"];
/// Folders that hold toolkits, and how the names of those begin.
const TOOLKITS: [(&str, &str); 3] = [
    ("/usr/local", "cuda"),
    ("/opt", "cuda"),
    ("C:/Program Files/NVIDIA GPU Computing Toolkit/CUDA", "v"),
];

/// Where to look for the compiler's library.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    /// Named by the user, a file or its folder: nothing else is tried.
    pub(super) explicit: Option<PathBuf>,
    /// Existing folders, first one first.
    pub(super) folders: Vec<PathBuf>,
}

impl Places {
    /// One file, or one folder.
    pub fn only(path: PathBuf) -> Self {
        Self { explicit: Some(path), folders: vec![] }
    }

    /// What [`VARIABLE`] names; else the toolkits of `CUDA_PATH` and `CUDA_HOME`, those at the
    /// usual places, packages of the Pythons in `VIRTUAL_ENV`, `CONDA_PREFIX`, `PATH` and the home
    /// folder, and the folder of `executable`.
    ///
    /// `variable` gives an environment variable.
    pub fn new(variable: impl Fn(&str) -> Option<OsString>, executable: Option<&Path>) -> Self {
        let path = |name: &str| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(explicit) = path(VARIABLE) {
            return Self::only(explicit);
        }
        let named = ["CUDA_PATH", "CUDA_HOME"].into_iter().filter_map(path);
        let usual = TOOLKITS.iter().flat_map(|(folder, start)| beginning(folder.as_ref(), start));
        let mut folders: Vec<PathBuf> =
            named.chain(usual).flat_map(|root| TOOLKIT.map(|part| root.join(part))).collect();
        let search = variable("PATH").unwrap_or_default();
        let prefixes = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(path);
        let prefixes = prefixes.chain(pythons(std::env::split_paths(&search)));
        let home = path("HOME").map(|home| home.join(".local"));
        for prefix in prefixes.chain(home) {
            folders.extend(packages(&prefix).flat_map(|p| WHEELS.map(|part| p.join(part))));
            folders.push(prefix.join("lib"));
        }
        let beside = executable.and_then(Path::parent);
        folders.extend(beside.into_iter().flat_map(|b| [b.to_owned(), b.join("../lib")]));
        let mut seen = std::collections::HashSet::new();
        folders.retain(|folder| folder.is_dir() && seen.insert(folder.clone()));
        Self { explicit: None, folders }
    }

    /// Where was looked, in words.
    pub(super) fn describe(&self) -> String {
        if let Some(explicit) = &self.explicit {
            return explicit.display().to_string();
        }
        let folders: Vec<String> = self.folders.iter().map(|f| f.display().to_string()).collect();
        let own = if folders.is_empty() { "no folder".to_owned() } else { folders.join(", ") };
        format!(
            "{own} and the system's own (CUDA_PATH, CUDA_HOME, VIRTUAL_ENV and {VARIABLE} name more)"
        )
    }
}

/// Folders in `folder` whose names begin with `start`, the greatest version first; the name alone
/// comes before all.
fn beginning(folder: &Path, start: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return vec![] };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.starts_with(start)).collect();
    let version = |name: &String| -> Vec<u32> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    names.sort_by_key(|name| (name != start, std::cmp::Reverse(version(name))));
    names.into_iter().map(|name| folder.join(name)).collect()
}

/// Prefixes of the Pythons in `folders`, also behind links.
fn pythons(folders: impl Iterator<Item = PathBuf>) -> impl Iterator<Item = PathBuf> {
    let program = if cfg!(windows) { "python.exe" } else { "python3" };
    let prefixes = move |folder: PathBuf| {
        let file = folder.join(program);
        let real = file.canonicalize().ok();
        let own = real.as_ref().map(|_| file.clone());
        own.into_iter().chain(real).filter_map(|file| {
            let folder = file.parent()?;
            if cfg!(windows) {
                Some(folder.to_owned())
            } else {
                folder.parent().map(Path::to_owned)
            }
        })
    };
    folders.filter(|folder| folder.is_absolute()).flat_map(prefixes)
}

/// Folders of packages of the Python installation at `prefix`.
fn packages(prefix: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let unix = beginning(&prefix.join("lib"), "python3");
    let unix = unix.into_iter().flat_map(|p| ["site-packages", "dist-packages"].map(|n| p.join(n)));
    unix.chain([prefix.join("Lib/site-packages")])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(root: &Path, folder: &str) -> PathBuf {
        let path = root.join(folder);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn what_is_named_goes_before_all() {
        let places = Places::new(|name| (name == VARIABLE).then(|| "/a/b".into()), None);
        assert_eq!(places, Places::only("/a/b".into()));
        assert!(places.describe().contains("/a/b"));
    }

    #[test]
    fn folders_come_in_order_and_exist() {
        let dir = tempfile::tempdir().unwrap();
        let toolkit = make(dir.path(), "toolkit/lib64");
        let venv = make(dir.path(), "venv/lib/python3.12/site-packages/nvidia/cu13/lib");
        let python = make(dir.path(), "py/lib/python3.9/site-packages/nvidia/cuda_nvrtc/lib");
        let bin = make(dir.path(), "py/bin");
        std::fs::write(bin.join("python3"), "").unwrap();
        let beside = make(dir.path(), "app");
        let variable = |name: &str| match name {
            "CUDA_HOME" => Some(dir.path().join("toolkit").into()),
            "CUDA_PATH" => Some("".into()),
            "VIRTUAL_ENV" => Some(dir.path().join("venv").into()),
            "PATH" => Some(std::env::join_paths([bin.clone()]).unwrap()),
            _ => None,
        };
        let places = Places::new(variable, Some(&beside.join("foretoken")));
        let at = |folder: &Path| places.folders.iter().position(|f| f == folder);
        let found = [&toolkit, &venv, &python, &beside].map(|f| at(f).expect("is looked at"));
        assert!(found.is_sorted(), "{:?}", places.folders);
        assert!(places.folders.iter().all(|f| f.is_dir()), "{:?}", places.folders);
        assert!(places.describe().contains("toolkit"), "{}", places.describe());
    }

    #[test]
    fn newer_toolkits_come_first() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["cuda-12.9", "cuda-13.0", "cuda-12.10", "cuda", "curl"] {
            make(dir.path(), name);
        }
        let found = beginning(dir.path(), "cuda");
        let names: Vec<_> = found.iter().map(|p| p.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["cuda", "cuda-13.0", "cuda-12.10", "cuda-12.9"]);
    }
}
