//! NVIDIA's run-time compiler: kernel text in, machine code of one architecture out.
//!
//! The library (`libnvrtc` 12 or 13) is opened where [`Places`] says; it needs neither a driver nor
//! headers. Not here: keeping what was compiled ([`super::cache`]), loading it ([`super::driver`]).

#![allow(unsafe_code)]

use super::Arch;
use super::library::functions;
use super::places::{FILES, Places};
use crate::Error;
use libloading::Library;
use shaders::Source;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

/// `nvrtcProgram`.
type Program = *mut c_void;

functions! {
    /// The compiler's functions (NVRTC documentation, 12.0 to 13).
    Functions {
        version = "nvrtcVersion" (*mut c_int, *mut c_int);
        create = "nvrtcCreateProgram" (
            *mut Program, *const c_char, *const c_char,
            c_int, *const *const c_char, *const *const c_char
        );
        destroy = "nvrtcDestroyProgram" (*mut Program);
        compile = "nvrtcCompileProgram" (Program, c_int, *const *const c_char);
        log_size = "nvrtcGetProgramLogSize" (Program, *mut usize);
        log = "nvrtcGetProgramLog" (Program, *mut c_char);
        cubin_size = "nvrtcGetCUBINSize" (Program, *mut usize);
        cubin = "nvrtcGetCUBIN" (Program, *mut c_char);
    }
}

/// The compiler.
#[derive(Clone)]
pub struct Nvrtc {
    functions: Functions,
    version: (u32, u32),
    path: PathBuf,
}

impl std::fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Nvrtc {:?} at {}", self.version, self.path.display())
    }
}

impl Nvrtc {
    /// Opens the first library that works; one newer than CUDA `newest` is passed over, since a
    /// driver runs only code of compilers up to its own major version.
    ///
    /// # Errors
    /// [`Error::Device`] says where was looked, what was found there, and what to install.
    pub fn find(places: &Places, newest: Option<u32>) -> Result<Self, Error> {
        let mut refused = vec![];
        for path in candidates(places) {
            let opened = Self::open(&path).and_then(|nvrtc| match newest {
                Some(newest) if nvrtc.version.0 > newest => {
                    Err(format!("is newer than the driver, which serves CUDA {newest}"))
                }
                _ => Ok(nvrtc),
            });
            match opened {
                Ok(nvrtc) => return Ok(nvrtc),
                // Of a bare name the system only says that it finds no such library.
                Err(_) if places.explicit.is_none() && path.components().count() == 1 => {}
                Err(why) => refused.push(format!("; {} {why}", path.display())),
            }
        }
        let best = newest.map_or(13, |newest| newest.min(13));
        let package = if best >= 13 { "nvidia-cuda-nvrtc" } else { "nvidia-cuda-nvrtc-cu12" };
        Err(Error::Device {
            device: "cuda".to_owned(),
            reason: format!(
                "the compiler library {} was not found in {}{}: install the CUDA toolkit, or `pip install {package}`",
                FILES.join(" or "),
                places.describe(),
                refused.concat(),
            ),
        })
    }

    fn open(path: &Path) -> Result<Self, String> {
        // SAFETY: a library of this name is NVIDIA's compiler, whose initialization asks nothing of
        // its caller.
        let library =
            unsafe { Library::new(path) }.map_err(|error| format!("cannot be opened: {error}"))?;
        // SAFETY: the parameters are those of NVIDIA's documentation, and it is never closed.
        let functions = unsafe { Functions::load(&library) }
            .map_err(|error| format!("lacks a function: {error}"))?;
        // Never closed: what it has started of its own may outlive any owner.
        std::mem::forget(library);
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both point to integers.
        let code = unsafe { (functions.version)(&raw mut major, &raw mut minor) };
        let version = u32::try_from(major).ok().zip(u32::try_from(minor).ok());
        match version {
            Some(version) if code == 0 && version.0 >= 12 => {
                Ok(Self { functions, version, path: path.to_owned() })
            }
            _ => Err(format!("is version {major}.{minor}, not 12 or newer")),
        }
    }

    /// Major and minor version of the compiler.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// As in `NVRTC 12.9`.
    pub fn describe(&self) -> String {
        format!("NVRTC {}.{}", self.version.0, self.version.1)
    }

    /// The library's file, or its name where the system found it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Machine code (a CUBIN) of `source` behind the headers for `arch`; each of `defines` is
    /// `NAME` or `NAME=VALUE`.
    ///
    /// # Errors
    /// [`Error::Device`] with the compiler's first complaint, which names file and line.
    pub fn compile(&self, source: &Source, arch: Arch, defines: &[&str]) -> Result<Vec<u8>, Error> {
        let options = options(arch, defines);
        let work = || {
            let text = c_string(&text(source))?;
            let options: Vec<CString> =
                options.iter().map(|o| c_string(o)).collect::<Result<_, _>>()?;
            let program = self.create(&text, &c_string(source.name)?)?;
            program.compile(&options)?;
            program.cubin()
        };
        work().map_err(|reason| Error::Device { device: format!("cuda {arch}"), reason })
    }

    fn create(&self, text: &CStr, name: &CStr) -> Result<Held<'_>, String> {
        let mut program = std::ptr::null_mut();
        // SAFETY: both texts end with a zero and are copied; there are no headers.
        let code = unsafe {
            let (none, create) = (std::ptr::null(), self.functions.create);
            create(&raw mut program, text.as_ptr(), name.as_ptr(), 0, none, none)
        };
        status(code, "nvrtcCreateProgram")?;
        Ok(Held { functions: &self.functions, program })
    }
}

/// Options of the compiler; part of what names a kept CUBIN.
pub(super) fn options(arch: Arch, defines: &[&str]) -> Vec<String> {
    let fixed = [format!("--gpu-architecture={arch}"), "--std=c++17".to_owned()];
    fixed.into_iter().chain(defines.iter().map(|define| format!("-D{define}"))).collect()
}

/// The headers and `source`, each under its own name for messages.
pub(super) fn text(source: &Source) -> String {
    let part = |source: &Source| format!("#line 1 \"{}\"\n{}\n", source.name, source.text);
    shaders::CUDA_HEADERS.iter().chain([source]).map(part).collect()
}

/// Files and names to open, in order.
fn candidates(places: &Places) -> Vec<PathBuf> {
    let inside = |folder: &Path| FILES.map(|file| folder.join(file)).into_iter();
    if let Some(path) = &places.explicit {
        return if path.is_dir() { inside(path).collect() } else { vec![path.clone()] };
    }
    let own = places.folders.iter().flat_map(|folder| inside(folder)).filter(|f| f.is_file());
    own.chain(FILES.map(PathBuf::from)).collect()
}

fn c_string(text: &str) -> Result<CString, String> {
    CString::new(text).map_err(|error| format!("a source cannot be compiled: {error}"))
}

fn status(code: c_int, function: &str) -> Result<(), String> {
    if code == 0 { Ok(()) } else { Err(format!("{function} failed with code {code}")) }
}

/// The line of a log that says what is wrong.
fn complaint(log: &str) -> Option<&str> {
    let lines = || log.lines().map(str::trim).filter(|line| !line.is_empty());
    lines().find(|line| line.contains("error") || line.contains("fatal")).or_else(|| lines().next())
}

/// A program inside the compiler.
struct Held<'a> {
    functions: &'a Functions,
    program: Program,
}

impl Held<'_> {
    fn compile(&self, options: &[CString]) -> Result<(), String> {
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let count = c_int::try_from(pointers.len()).map_err(|error| error.to_string())?;
        // SAFETY: the program lives, and `pointers` has `count` texts that end with a zero.
        let code = unsafe { (self.functions.compile)(self.program, count, pointers.as_ptr()) };
        status(code, "nvrtcCompileProgram").map_err(|failed| {
            let log = self.bytes(self.functions.log_size, self.functions.log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            complaint(log.trim_end_matches('\0')).map_or(failed, str::to_owned)
        })
    }

    fn cubin(&self) -> Result<Vec<u8>, String> {
        let bytes = self.bytes(self.functions.cubin_size, self.functions.cubin)?;
        if bytes.is_empty() {
            Err("the compiler made no machine code".to_owned())
        } else {
            Ok(bytes)
        }
    }

    /// What a pair of functions gives: how many bytes, and the bytes.
    fn bytes(
        &self,
        size: unsafe extern "system" fn(Program, *mut usize) -> c_int,
        fill: unsafe extern "system" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, String> {
        let mut len = 0;
        // SAFETY: the program lives.
        status(unsafe { size(self.program, &raw mut len) }, "asking for a size")?;
        let mut bytes = vec![0u8; len];
        // SAFETY: `fill` writes the `len` bytes that `size` told of.
        status(unsafe { fill(self.program, bytes.as_mut_ptr().cast()) }, "asking for a result")?;
        Ok(bytes)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `create`, not used again. A failure could only leak.
        let _ = unsafe { (self.functions.destroy)(&raw mut self.program) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_there_is_none_the_error_says_where_it_looked() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places::only(dir.path().to_owned());
        let said = Nvrtc::find(&places, None).unwrap_err().to_string();
        for part in [dir.path().to_str().unwrap(), "pip install nvidia-cuda-nvrtc", "toolkit"] {
            assert!(said.contains(part), "{part} is not in {said}");
        }
        assert!(Nvrtc::find(&places, Some(12)).unwrap_err().to_string().contains("-cu12"));
    }

    #[test]
    fn what_is_no_library_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILES[0]);
        std::fs::write(&file, "no library").unwrap();
        let said = |newest| {
            let places = Places { explicit: None, folders: vec![dir.path().to_owned()] };
            // A library elsewhere on this machine is opened by its plain name.
            Nvrtc::find(&places, newest).err().map(|error| error.to_string())
        };
        for newest in [None, Some(12)] {
            let Some(said) = said(newest) else { continue };
            assert!(said.contains("cannot be opened"), "{said}");
            assert!(said.contains(file.to_str().unwrap()), "{said}");
        }
    }

    #[test]
    fn the_first_error_of_a_log_is_what_is_said() {
        let log = "a.cu(1): warning: w\n\na.cu(3): error: x is undefined\na.cu(4): error: y\n";
        assert_eq!(complaint(log), Some("a.cu(3): error: x is undefined"));
        assert_eq!(complaint("\n"), None);
    }

    #[test]
    fn each_part_of_a_text_has_its_own_lines() {
        let all = text(&Source { name: "cuda/a.cu", text: "one\ntwo" });
        let at = |word: &str| all.find(word).unwrap();
        assert!(at("\"cuda/prelude.cuh\"") < at("#line 1 \"cuda/a.cu\"\none\ntwo\n"));
    }
}
