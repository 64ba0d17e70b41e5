//! Compiled kernels on disk: one file a source, architecture, option list and compiler version.
//!
//! The folder comes in as an option; its files may be deleted at any time. A file that is not, to
//! the last bit, what was written for its key is compiled anew and replaced. Not here: compiling
//! ([`super::nvrtc`]).

use super::Arch;
use super::nvrtc::{Nvrtc, options, text};
use crate::Error;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use shaders::Source;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

type Hash = [u8; 32];

/// Compiled sources.
#[derive(Debug)]
pub(crate) struct Cubins {
    /// A CUBIN for each source, in order.
    pub(crate) images: Vec<Vec<u8>>,
    /// Why some could not be kept, if so: no error, since keeping only saves time.
    pub(crate) not_kept: Option<String>,
}

/// Every one of `sources` for `arch`: from `folder`, or compiled now on all threads and kept there.
///
/// # Errors
/// Those of [`Nvrtc::compile`].
pub(crate) fn cubins(
    nvrtc: &Nvrtc,
    sources: &[Source],
    arch: Arch,
    folder: Option<&Path>,
) -> Result<Cubins, Error> {
    let one = |source: &Source| {
        let key = key(source, &options(arch, &[]), nvrtc.version());
        cached(folder, &key, || nvrtc.compile(source, arch, &[]))
    };
    let made: Vec<_> = sources.par_iter().map(one).collect::<Result<_, _>>()?;
    let (images, remarks): (Vec<_>, Vec<_>) = made.into_iter().unzip();
    Ok(Cubins { images, not_kept: remarks.into_iter().flatten().next() })
}

/// Hash of all that a CUBIN follows from.
fn key(source: &Source, options: &[String], version: (u32, u32)) -> Hash {
    let mut hash = Sha256::new();
    for part in [&text(source), &options.join("\n"), &format!("nvrtc {version:?}")] {
        // Lengths keep the parts apart.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().into()
}

/// The image under `key`, and why it could not be kept, if so.
fn cached(
    folder: Option<&Path>,
    key: &Hash,
    compile: impl FnOnce() -> Result<Vec<u8>, Error>,
) -> Result<(Vec<u8>, Option<String>), Error> {
    let Some(folder) = folder else { return Ok((compile()?, None)) };
    let name: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = folder.join(name).with_extension("cubin");
    if let Some(image) = read(&path, key) {
        return Ok((image, None));
    }
    let image = compile()?;
    let kept = write(folder, &path, key, &image);
    let remark =
        |error| format!("kernels were compiled but not kept in {}: {error}", folder.display());
    Ok((image, kept.err().map(remark)))
}

/// What stands before an image in its file.
fn seal(key: &Hash, image: &[u8]) -> Hash {
    Sha256::new().chain_update(key).chain_update(image).finalize().into()
}

/// None if there is no such file, or it is not what was written for `key`.
fn read(path: &Path, key: &Hash) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let (found, image) = bytes.split_first_chunk::<32>()?;
    (*found == seal(key, image)).then(|| image.to_vec())
}

fn write(folder: &Path, path: &Path, key: &Hash, image: &[u8]) -> std::io::Result<()> {
    static WRITES: AtomicUsize = AtomicUsize::new(0);
    std::fs::create_dir_all(folder)?;
    // Under a name of its own first: others may read or write the same file now.
    let write = WRITES.fetch_add(1, Ordering::Relaxed);
    let unfinished = path.with_extension(format!("{}-{write}.tmp", std::process::id()));
    let bytes = [seal(key, image).as_slice(), image].concat();
    let kept = std::fs::write(&unfinished, bytes).and_then(|()| std::fs::rename(&unfinished, path));
    if kept.is_err() {
        // A disk may be full in the middle; what is left is of no use, and may not be there.
        let _ = std::fs::remove_file(&unfinished);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: Source = Source { name: "a.cu", text: "a" };

    fn get(folder: &Path, key: &Hash) -> (Vec<u8>, bool) {
        let mut compiled = false;
        let compile = || {
            compiled = true;
            Ok(vec![1, 2, 3])
        };
        let (image, remark) = cached(Some(folder), key, compile).unwrap();
        assert_eq!(remark, None);
        (image, compiled)
    }

    #[test]
    fn the_second_time_nothing_is_compiled() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("deep/below");
        assert_eq!(get(&folder, &[7; 32]), (vec![1, 2, 3], true));
        assert_eq!(get(&folder, &[7; 32]), (vec![1, 2, 3], false));
        assert_eq!(get(&folder, &[8; 32]), (vec![1, 2, 3], true));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn what_was_changed_or_moved_is_compiled_anew_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        get(dir.path(), &[7; 32]);
        let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let good = std::fs::read(&path).unwrap();
        let flipped = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            bytes
        };
        let of_another = [seal(&[8; 32], &[1, 2, 3]).as_slice(), &[1, 2, 3]].concat();
        let last = good.len() - 1;
        for bad in [
            vec![],
            good[..20].to_vec(),
            good[..last].to_vec(),
            flipped(0),
            flipped(last),
            of_another,
        ] {
            std::fs::write(&path, &bad).unwrap();
            assert_eq!(get(dir.path(), &[7; 32]), (vec![1, 2, 3], true), "{bad:?}");
            assert_eq!(std::fs::read(&path).unwrap(), good, "replaced");
        }
    }

    #[test]
    fn a_place_that_cannot_be_written_is_said_and_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let (image, remark) = cached(Some(&file), &[7; 32], || Ok(vec![1])).unwrap();
        assert_eq!(image, [1]);
        assert!(remark.unwrap().contains("not kept"));
    }

    #[test]
    fn all_that_matters_is_in_the_key() {
        let options = |text: &str| vec![text.to_owned()];
        let base = key(&SOURCE, &options("x"), (12, 9));
        let other = Source { name: "a.cu", text: "b" };
        assert_eq!(base, key(&SOURCE, &options("x"), (12, 9)));
        assert_ne!(base, key(&other, &options("x"), (12, 9)));
        assert_ne!(base, key(&SOURCE, &options("y"), (12, 9)));
        assert_ne!(base, key(&SOURCE, &options("x"), (13, 0)));
    }
}
