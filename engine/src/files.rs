//! Where a model's files come from: a folder, or bytes inside the binary (the demo pair).
//!
//! Not here: what is in them. Weight files are mapped by [`crate::checkpoint`], the small ones
//! (config, tokenizer, template) are read whole here.

use crate::Error;
use std::borrow::Cow;
use std::path::{Path, PathBuf};

/// A model's files by name.
#[derive(Debug, Clone)]
pub enum ModelFiles {
    /// A folder as `save_pretrained` writes it.
    Folder(PathBuf),
    /// Files compiled into the binary.
    Embedded {
        /// Shown in messages in place of a folder.
        name: &'static str,
        /// Name and content of each file.
        files: &'static [(&'static str, &'static [u8])],
    },
}

impl ModelFiles {
    /// The path shown in messages for file `name`.
    pub fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Folder(dir) => dir.join(name),
            Self::Embedded { name: model, .. } => Path::new(model).join(name),
        }
    }

    /// Whole content of file `name`, or none where it does not exist.
    ///
    /// # Errors
    /// [`Error::Io`] if it exists but cannot be read.
    pub fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, Error> {
        match self {
            Self::Folder(dir) => match std::fs::read(dir.join(name)) {
                Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(Error::Io { path: self.path(name), source }),
            },
            Self::Embedded { files, .. } => {
                Ok(files.iter().find(|(n, _)| *n == name).map(|(_, bytes)| Cow::Borrowed(*bytes)))
            }
        }
    }
}
