//! The header of a safetensors file, checked before a single weight byte is touched.
//!
//! ```text
//! 8 bytes   length of the JSON text, little-endian
//! JSON      {"name": {"dtype": "F16", "shape": [..], "data_offsets": [begin, end]}, ..}
//! data      all tensors, offsets relative to here: no holes, no overlaps
//! ```
//! Not here: which tensors a model needs. Input: the bytes of a file of any origin.

use crate::Error;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::Path;

/// Longest JSON text that is read, in bytes.
const MAX_HEADER: u64 = 100_000_000;

/// Element types of the format and their width in bits.
const DTYPES: &[(&str, usize)] = &[
    ("BOOL", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("I16", 16),
    ("U16", 16),
    ("F16", 16),
    ("BF16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F32", 32),
    ("C64", 64),
    ("F64", 64),
    ("I64", 64),
    ("U64", 64),
];

/// A tensor as a header declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its name.
    pub(super) name: String,
    /// Its type, as the format spells it.
    pub(super) dtype: &'static str,
    /// Its dimensions.
    pub(super) shape: Vec<usize>,
    /// Where its bytes are in the file.
    pub(super) range: Range<usize>,
}

/// Reads and checks the header of the file `path` with content `file`.
pub(super) fn read(path: &Path, file: &[u8]) -> Result<Vec<Entry>, Error> {
    parse(file).map_err(|reason| Error::Header { path: path.to_owned(), reason })
}

fn parse(file: &[u8]) -> Result<Vec<Entry>, String> {
    let found = file.len();
    let (length, rest) = file
        .split_first_chunk::<8>()
        .ok_or_else(|| format!("the file has {found} bytes, its header alone needs 8"))?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(format!("the header claims {length} bytes, at most {MAX_HEADER} are allowed"));
    }
    let rest_len = rest.len();
    let (json, data) = rest.split_at_checked(length as usize).ok_or_else(|| {
        format!("the header claims {length} bytes, only {rest_len} follow: the file is truncated")
    })?;
    let raw: Header = serde_json::from_slice(json).map_err(|e| format!("header: {e}"))?;
    let start = 8 + json.len();
    let entries = raw.0.into_iter().map(|(name, t)| entry(name, &t, start, data.len()));
    let entries = entries.collect::<Result<Vec<_>, _>>()?;
    check_names(&entries)?;
    check_cover(&entries, start..found)?;
    Ok(entries)
}

fn entry(name: String, raw: &RawEntry, start: usize, data: usize) -> Result<Entry, String> {
    let dtype = DTYPES.iter().find(|(n, _)| *n == raw.dtype);
    let (dtype, bits) =
        *dtype.ok_or_else(|| format!("tensor {name}: unknown type {}", raw.dtype))?;
    let [begin, end] = raw.data_offsets;
    if begin > end || end > data {
        return Err(format!(
            "tensor {name}: offsets {begin}..{end} are outside the {data} bytes of data"
        ));
    }
    let expected = byte_count(&raw.shape, bits)
        .ok_or_else(|| format!("tensor {name}: shape {:?} of {dtype} overflows", raw.shape))?;
    if expected != end - begin {
        return Err(format!(
            "tensor {name}: shape {:?} of {dtype} needs {expected} bytes, offsets give {}",
            raw.shape,
            end - begin
        ));
    }
    Ok(Entry { name, dtype, shape: raw.shape.clone(), range: start + begin..start + end })
}

/// Bytes of a tensor, none if they overflow or are not whole.
fn byte_count(shape: &[usize], bits: usize) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |product, d| product.checked_mul(*d))?;
    let bits = elements.checked_mul(bits)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

fn check_names(entries: &[Entry]) -> Result<(), String> {
    let mut seen = HashSet::new();
    match entries.iter().find(|e| !seen.insert(e.name.as_str())) {
        Some(e) => Err(format!("tensor {} is declared twice", e.name)),
        None => Ok(()),
    }
}

/// Checks that the tensors cover `data` without holes or overlaps.
fn check_cover(entries: &[Entry], data: Range<usize>) -> Result<(), String> {
    let mut sorted: Vec<&Entry> = entries.iter().collect();
    sorted.sort_by_key(|e| (e.range.start, e.range.end));
    let mut end = data.start;
    for e in sorted {
        let begin = e.range.start;
        if begin != end {
            let what = if begin < end { "overlaps the one before" } else { "leaves a hole before" };
            let at = begin - data.start;
            return Err(format!("tensor {}: it {what} (data offset {at})", e.name));
        }
        end = e.range.end;
    }
    if end == data.end {
        return Ok(());
    }
    Err(format!("the tensors end at byte {end} of a file of {} bytes", data.end))
}

/// The JSON text: tensors in order, duplicates kept so that they can be refused.
struct Header(Vec<(String, RawEntry)>);

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut all = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        all.push((name, map.next_value()?));
                    }
                }
                Ok(Header(all))
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut out = (json.len() as u64).to_le_bytes().to_vec();
        out.extend_from_slice(json.as_bytes());
        out.resize(out.len() + data, 7);
        out
    }

    const TWO: &str = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"I32","shape":[2],"data_offsets":[12,20]},
        "a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},
        "empty":{"dtype":"F32","shape":[0,4],"data_offsets":[12,12]}}   "#;

    #[test]
    fn reads_what_it_should() {
        let bytes = file(TWO, 20);
        let all = parse(&bytes).unwrap();
        let start = bytes.len() - 20;
        assert_eq!(all[0].name, "b");
        assert_eq!(all[1].range, start..start + 12);
        assert_eq!(all[1].shape, [2, 3]);
        assert_eq!(parse(&file("{}", 0)).unwrap(), []);
    }

    fn one(dtype: &str, shape: &str, offsets: &str, data: usize) -> String {
        let json =
            format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
        parse(&file(&json, data)).unwrap_err()
    }

    #[test]
    fn refuses_what_breaks_the_format() {
        let says = |err: String, what: &str| assert!(err.contains(what), "{err}");
        says(parse(&[1, 2, 3]).unwrap_err(), "the file has 3 bytes");
        says(parse(&u64::MAX.to_le_bytes()).unwrap_err(), "at most 100000000");
        says(parse(&file(TWO, 20)[..60]).unwrap_err(), "truncated");
        says(parse(&file(TWO, 19)).unwrap_err(), "outside the 19 bytes");
        says(parse(&file(TWO, 21)).unwrap_err(), "the tensors end at byte");
        says(parse(&file("[1]", 0)).unwrap_err(), "header:");
        says(parse(&file("{\"a\":", 0)).unwrap_err(), "header:");
        says(one("F17", "[1]", "[0,2]", 2), "unknown type F17");
        says(one("F16", "[1]", "[2,0]", 2), "outside");
        says(one("F16", "[3]", "[0,2]", 2), "needs 6 bytes, offsets give 2");
        says(one("F16", "[9223372036854775807,4]", "[0,2]", 2), "overflows");
        says(one("F4", "[3]", "[0,2]", 2), "overflows");
        says(one("F16", "[-1]", "[0,2]", 2), "header:");
        says(one("F16", "[1]", "[0,2,4]", 4), "header:");
        says(one("F16", "[1]", "[2,4]", 4), "leaves a hole before (data offset 2)");
        let twice = r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                        "t":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
        says(parse(&file(twice, 2)).unwrap_err(), "t is declared twice");
        let overlap = r#"{"t":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
                          "u":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#;
        says(parse(&file(overlap, 3)).unwrap_err(), "u: it overlaps the one before");
    }

    proptest! {
        /// Whatever bytes a file has, reading gives tensors inside it or an error.
        #[test]
        fn mutations_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in 0usize..400) {
            let mut bytes = file(TWO, 20);
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(bytes.len().saturating_sub(cut % 40));
            if let Ok(all) = parse(&bytes) {
                for e in all {
                    prop_assert!(e.range.start <= e.range.end && e.range.end <= bytes.len());
                }
            }
        }
    }
}
