//! The tensors of a model folder: one safetensors file or several with an index, mapped or
//! compiled in.
//!
//! Everything about where bytes lie is checked here at open, so that later reads cannot fail.
//! Not here: which tensors a model needs and what they mean ([`crate::weights`]).
//! Input: files of any origin; a bad one is an error that names it, never a read outside it.

mod header;
mod map;

use crate::Error;
use crate::config::{parse_object, show};
use crate::files::ModelFiles;
use serde_json::Value;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Number of a tensor within its [`Checkpoint`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorId(usize);

/// A tensor of the checkpoint; its bytes lie inside its file, `shape` and `dtype` match them.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its type as safetensors spells it: `F16`, `BF16`, `I32`, ...
    pub dtype: &'static str,
    /// Its dimensions.
    pub shape: Vec<usize>,
    shard: usize,
    range: Range<usize>,
}

/// All tensors of a model.
#[derive(Debug)]
pub struct Checkpoint {
    root: PathBuf,
    shards: Vec<Shard>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, TensorId>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Mapped(map::Map),
    Embedded(&'static [u8]),
}

impl Data {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map.bytes(),
            Self::Embedded(bytes) => bytes,
        }
    }
}

impl Checkpoint {
    /// Opens `model.safetensors`, or else the shards of `model.safetensors.index.json`.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::Io`], [`Error::Json`] and [`Error::Header`], each with the
    /// file that is at fault.
    pub fn open(files: &ModelFiles) -> Result<Self, Error> {
        let mut all = Self {
            root: match files {
                ModelFiles::Folder(dir) => dir.clone(),
                ModelFiles::Embedded { name, .. } => PathBuf::from(name),
            },
            shards: Vec::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
        };
        if let Some(data) = open_data(files, SINGLE)? {
            all.add(files.path(SINGLE), data)?;
            return Ok(all);
        }
        let Some(index) = files.read(INDEX)? else {
            let needed_for = format!(
                "the weights; {INDEX} is not there either (other formats must be converted to safetensors first)"
            );
            return Err(Error::MissingFile { path: files.path(SINGLE), needed_for });
        };
        all.add_indexed(files, &index)?;
        Ok(all)
    }

    /// The bytes of each file, in order of their names.
    pub fn files(&self) -> impl Iterator<Item = &[u8]> {
        self.shards.iter().map(|shard| shard.data.bytes())
    }

    fn add_indexed(&mut self, files: &ModelFiles, index: &[u8]) -> Result<(), Error> {
        let path = files.path(INDEX);
        let weight_map = weight_map(&path, index)?;
        let mut shard_names: Vec<&str> = weight_map.iter().map(|(_, shard)| &**shard).collect();
        shard_names.sort_unstable();
        shard_names.dedup();
        for name in &shard_names {
            let Some(data) = open_data(files, name)? else {
                let needed_for = format!("{INDEX} places tensors in it; download it again");
                return Err(Error::MissingFile { path: files.path(name), needed_for });
            };
            self.add(files.path(name), data)?;
        }
        for (tensor, shard) in &weight_map {
            let found = self.find(tensor).map(|id| self.path_of(id));
            if found != Some(&files.path(shard)) {
                let reason = format!("{INDEX} places tensor {tensor} here, but it is not");
                return Err(Error::Header { path: files.path(shard), reason });
            }
        }
        Ok(())
    }

    /// Adds the tensors of one file.
    fn add(&mut self, path: PathBuf, data: Data) -> Result<(), Error> {
        let shard = self.shards.len();
        for e in header::read(&path, data.bytes())? {
            let id = TensorId(self.tensors.len());
            if self.by_name.insert(e.name.clone(), id).is_some() {
                let reason = format!("tensor {} is in another shard too", e.name);
                return Err(Error::Header { path, reason });
            }
            let header::Entry { name, dtype, shape, range } = e;
            self.tensors.push(TensorInfo { name, dtype, shape, shard, range });
        }
        self.shards.push(Shard { path, data });
        Ok(())
    }

    /// The folder (or embedded model) all of this came from.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// All tensors in file order.
    pub fn ids(&self) -> impl Iterator<Item = TensorId> + use<> {
        (0..self.tensors.len()).map(TensorId)
    }

    /// The tensor called `name`.
    pub fn find(&self, name: &str) -> Option<TensorId> {
        self.by_name.get(name).copied()
    }

    /// Name, type and shape of a tensor.
    pub fn info(&self, id: TensorId) -> &TensorInfo {
        &self.tensors[id.0]
    }

    /// The file a tensor lies in.
    pub fn path_of(&self, id: TensorId) -> &Path {
        &self.shards[self.info(id).shard].path
    }

    /// The bytes of a tensor: little-endian, row-major, possibly unaligned.
    pub fn bytes(&self, id: TensorId) -> &[u8] {
        let info = self.info(id);
        &self.shards[info.shard].data.bytes()[info.range.clone()]
    }

    /// Gives the memory of a tensor's pages back to the system; reading it again is allowed.
    pub fn release(&self, id: TensorId) {
        let info = self.info(id);
        if let Data::Mapped(map) = &self.shards[info.shard].data {
            map.release(info.range.clone());
        }
    }
}

/// Opens file `name`, or none where it does not exist.
fn open_data(files: &ModelFiles, name: &str) -> Result<Option<Data>, Error> {
    let ModelFiles::Folder(dir) = files else {
        let ModelFiles::Embedded { files, .. } = files else { return Ok(None) };
        let file = files.iter().find(|(n, _)| *n == name);
        return Ok(file.map(|(_, bytes)| Data::Embedded(bytes)));
    };
    let path = dir.join(name);
    let io = |source| Error::Io { path: path.clone(), source };
    // Asked before opening: to open a pipe could wait for ever.
    let meta = match std::fs::metadata(&path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io(e)),
    };
    if !meta.is_file() {
        let reason = "it is not a regular file".to_owned();
        return Err(Error::Header { path, reason });
    }
    if meta.len() == 0 {
        // An empty file cannot be mapped everywhere; the header check names the error.
        return Ok(Some(Data::Embedded(&[])));
    }
    let file = File::open(&path).map_err(io)?;
    Ok(Some(Data::Mapped(map::Map::new(&file).map_err(io)?)))
}

/// The pairs (tensor, shard file) of an index.
fn weight_map(path: &Path, index: &[u8]) -> Result<Vec<(String, String)>, Error> {
    let json = |reason: String| Error::Json { path: path.to_owned(), reason };
    let mut index = parse_object(path, index)?;
    let Some(Value::Object(map)) = index.remove("weight_map") else {
        return Err(json("expected an object weight_map of tensor and file names".to_owned()));
    };
    let pair = |(tensor, shard): (String, Value)| match shard {
        Value::String(shard) if is_file_name(&shard) => Ok((tensor, shard)),
        other => Err(json(format!(
            "weight_map.{tensor} is {}, expected the name of a file in this folder",
            show(&other)
        ))),
    };
    map.into_iter().map(pair).collect()
}

/// Whether `name` is a plain file name, so that an index cannot point outside its folder.
fn is_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let plain = matches!(parts.next(), Some(std::path::Component::Normal(p)) if p == name);
    plain && parts.next().is_none() && !name.contains(['/', '\\', ':'])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use testkit::Tensor;

    fn write(dir: &Path, name: &str, tensors: &[&str]) {
        let all: BTreeMap<String, Tensor> =
            tensors.iter().map(|n| ((*n).to_owned(), Tensor::f16(&[2], &[1.0, 2.0]))).collect();
        testkit::write_tensors(&dir.join(name), &all);
    }

    fn open(dir: &Path) -> Result<Checkpoint, Error> {
        Checkpoint::open(&ModelFiles::Folder(dir.to_owned()))
    }

    fn sharded(index: &str) -> Error {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "a.safetensors", &["x", "y"]);
        write(dir.path(), "b.safetensors", &["z"]);
        write(dir.path(), "c.safetensors", &["x"]);
        std::fs::write(dir.path().join(INDEX), index).unwrap();
        open(dir.path()).unwrap_err()
    }

    #[test]
    fn shards_are_one_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "a.safetensors", &["x", "unlisted"]);
        write(dir.path(), "b.safetensors", &["z"]);
        let index = r#"{"metadata":{}, "weight_map":{"x":"a.safetensors","z":"b.safetensors"}}"#;
        std::fs::write(dir.path().join(INDEX), index).unwrap();
        let all = open(dir.path()).unwrap();
        assert_eq!(all.len(), 3);
        let z = all.find("z").unwrap();
        assert!(all.path_of(z).ends_with("b.safetensors"));
        assert_eq!(all.bytes(z), Tensor::f16(&[2], &[1.0, 2.0]).bytes);
        all.release(z);
        assert_eq!(all.bytes(z), Tensor::f16(&[2], &[1.0, 2.0]).bytes, "released pages come back");
    }

    #[test]
    fn bad_indexes_are_named() {
        let err = sharded(r#"{"weight_map":{"x":"a.safetensors","q":"a.safetensors"}}"#);
        assert!(err.to_string().contains("places tensor q here, but it is not"), "{err}");
        let err = sharded(r#"{"weight_map":{"x":"a.safetensors","z":"c.safetensors"}}"#);
        assert!(err.to_string().contains("tensor x is in another shard too"), "{err}");
        let err = sharded(r#"{"weight_map":{"x":"a.safetensors","y":"d.safetensors"}}"#);
        assert!(matches!(&err, Error::MissingFile { path, .. } if path.ends_with("d.safetensors")));
        for bad in ["../a.safetensors", "/etc/passwd", "", "x/a", ".."] {
            let err = sharded(&format!(r#"{{"weight_map":{{"x":"{bad}"}}}}"#));
            assert!(matches!(&err, Error::Json { reason, .. } if reason.contains("weight_map.x")));
        }
        assert!(matches!(sharded(r#"{"weight_map":[]}"#), Error::Json { .. }));
        assert!(matches!(sharded("{"), Error::Json { .. }));
    }

    #[test]
    fn missing_empty_and_odd_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let err = open(dir.path()).unwrap_err();
        assert!(matches!(&err, Error::MissingFile { path, .. } if path.ends_with(SINGLE)), "{err}");
        std::fs::write(dir.path().join(SINGLE), b"").unwrap();
        let err = open(dir.path()).unwrap_err();
        assert!(
            matches!(&err, Error::Header { reason, .. } if reason.contains("0 bytes")),
            "{err}"
        );
        std::fs::remove_file(dir.path().join(SINGLE)).unwrap();
        std::fs::create_dir(dir.path().join(SINGLE)).unwrap();
        let err = open(dir.path()).unwrap_err();
        assert!(
            matches!(&err, Error::Header { reason, .. } if reason.contains("regular")),
            "{err}"
        );
    }

    /// Bytes of `file` that are in memory, as the kernel counts them.
    #[cfg(target_os = "linux")]
    fn resident(file: &Path) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let after = maps.split(&*file.to_string_lossy()).nth(1).unwrap();
        let rss = after.lines().find_map(|l| l.strip_prefix("Rss:")).unwrap();
        rss.split_whitespace().next().unwrap().parse::<usize>().unwrap() * 1024
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn released_tensors_leave_memory() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(SINGLE);
        let values = vec![1.0; 1 << 20];
        let tensor = Tensor::f32(&[1 << 20], &values);
        testkit::write_tensors(&file, &BTreeMap::from([("w".to_owned(), tensor)]));
        let all = open(dir.path()).unwrap();
        let id = all.find("w").unwrap();
        assert!(all.bytes(id).iter().any(|b| *b != 0));
        assert_eq!(all.bytes(id).iter().filter(|b| **b == 0x3f).count(), 1 << 20);
        assert!(resident(&file) >= 4 << 20);
        all.release(id);
        // The page with the header may stay.
        assert!(resident(&file) <= 64 << 10, "{}", resident(&file));
    }

    #[test]
    fn embedded_files_open_like_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), SINGLE, &["w"]);
        let bytes: &'static [u8] = std::fs::read(dir.path().join(SINGLE)).unwrap().leak();
        let list: &'static [(&str, &[u8])] = vec![(SINGLE, bytes)].leak();
        let all = Checkpoint::open(&ModelFiles::Embedded { name: "demo", files: list }).unwrap();
        assert_eq!(all.path_of(all.find("w").unwrap()), Path::new("demo").join(SINGLE));
    }
}
