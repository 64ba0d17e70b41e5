//! Measured costs on disk: one small file a pair of models and machine.
//!
//! In folder `costs` of [`environment::caches`]. Costs depend on what is computed, not on the values
//! of weights, so the key is the programs (every shape, format and operation), whether their ids are
//! the same, the step sizes, the processor, threads and instruction set, and this version. A file
//! that does not say exactly the same, or does not parse, is measured anew and replaced.

use crate::environment;
use engine::engine::EngineConfig;
use engine::speculation::{Costs, Curve, DraftCosts};
use kernels::Program;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What costs depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Key {
    text: String,
    name: String,
}

/// Goes up whenever the same numbers mean something else, or steps take another time.
const MEANING: u32 = 4;

impl Key {
    /// The key of `verifier` and `draft`, which may have the same ids, under `config`; `machine`
    /// names processor, device, instruction set and threads.
    pub(crate) fn new(
        verifier: &Program,
        draft: Option<(&Program, bool)>,
        config: &EngineConfig,
        machine: &str,
    ) -> Self {
        let digest = |program: &Program| fnv1a(format!("{program:?}").as_bytes());
        let text = format!(
            "foretoken {}, costs {MEANING}, on {machine}: verifier {:016x}, draft {:016x}, \
             same ids {}, {} sequences, {} drafted",
            env!("CARGO_PKG_VERSION"),
            digest(verifier),
            draft.map_or(0, |(program, _)| digest(program)),
            draft.is_some_and(|(_, same_ids)| same_ids),
            config.max_sequences,
            config.max_drafted,
        );
        let name = format!("{:016x}.json", fnv1a(text.as_bytes()));
        Self { text, name }
    }
}

/// FNV-1a, 64 bits (Fowler, Noll, Vo): the same in every build, which the standard library's
/// hashes do not promise.
fn fnv1a(bytes: &[u8]) -> u64 {
    let step = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// The costs under `key`: from disk, or measured now and kept. A file that cannot be kept is no
/// error, since it only saves time: `say` gets the reason.
///
/// # Errors
/// Those of `measure`.
pub(crate) fn cached(
    key: &Key,
    measure: impl FnOnce() -> anyhow::Result<Costs>,
    say: impl FnOnce(&str),
) -> anyhow::Result<Costs> {
    let folder = environment::caches().map(|caches| caches.join("costs"));
    cached_in(folder.as_deref(), key, measure, say)
}

fn cached_in(
    folder: Option<&Path>,
    key: &Key,
    measure: impl FnOnce() -> anyhow::Result<Costs>,
    say: impl FnOnce(&str),
) -> anyhow::Result<Costs> {
    let Some(folder) = folder else { return measure() };
    let path = folder.join(&key.name);
    if let Some(costs) = read(&path, key) {
        return Ok(costs);
    }
    let costs = measure()?;
    if let Err(error) = write(folder, &path, key, &costs) {
        say(&format!("costs were measured but not kept in {}: {error}", path.display()));
    }
    Ok(costs)
}

/// A file.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    key: String,
    verify: Vec<(usize, f64)>,
    draft: Option<StoredDraft>,
    lookup: f64,
    token: f64,
}

#[derive(Debug, Serialize, Deserialize)]
struct StoredDraft {
    step: Vec<(usize, f64)>,
    start: f64,
    prefill_token: f64,
}

impl Stored {
    fn new(key: &Key, costs: &Costs) -> Self {
        let draft = costs.draft.as_ref().map(|draft| StoredDraft {
            step: draft.step.points().to_vec(),
            start: draft.start,
            prefill_token: draft.prefill_token,
        });
        let verify = costs.verify.points().to_vec();
        let Costs { lookup, token, .. } = *costs;
        Self { key: key.text.clone(), verify, draft, lookup, token }
    }

    /// The costs, if they are times.
    fn costs(self) -> Option<Costs> {
        let draft = match self.draft {
            None => None,
            Some(draft) => Some(DraftCosts {
                step: Curve::new(draft.step)?,
                start: time(draft.start)?,
                prefill_token: time(draft.prefill_token)?,
            }),
        };
        let (verify, lookup, token) =
            (Curve::new(self.verify)?, time(self.lookup)?, time(self.token)?);
        Some(Costs { verify, draft, lookup, token })
    }
}

fn time(seconds: f64) -> Option<f64> {
    (seconds.is_finite() && seconds >= 0.0).then_some(seconds)
}

/// None if there is no such file or it is not what `key` stands for; it is replaced then.
fn read(path: &Path, key: &Key) -> Option<Costs> {
    let stored: Stored = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    (stored.key == key.text).then_some(stored)?.costs()
}

fn write(folder: &Path, path: &Path, key: &Key, costs: &Costs) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    // Under a name of its own first: another process may read or write the same file now.
    let unfinished = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&unfinished, serde_json::to_vec_pretty(&Stored::new(key, costs))?)?;
    std::fs::rename(&unfinished, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs() -> Costs {
        let draft = DraftCosts {
            step: Curve::new(vec![(1, 2e-4)]).unwrap(),
            start: 1e-5,
            prefill_token: 1.0 / 3.0 * 1e-5,
        };
        let verify = Curve::new(vec![(1, 1e-3), (4, 1.5e-3)]).unwrap();
        Costs { verify, draft: Some(draft), lookup: 1e-6, token: 2e-5 }
    }

    fn key(text: &str) -> Key {
        Key { text: text.to_owned(), name: "a.json".to_owned() }
    }

    fn silent(reason: &str) {
        panic!("{reason}");
    }

    #[test]
    fn a_second_start_reads_what_the_first_measured() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Some(dir.path());
        let first = cached_in(folder, &key("k"), || Ok(costs()), silent).unwrap();
        let second = cached_in(folder, &key("k"), || panic!("measured again"), silent).unwrap();
        assert_eq!((&first, &second), (&costs(), &costs()), "to the last bit");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn what_is_stale_or_broken_is_measured_anew_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let good = serde_json::to_string(&Stored::new(&key("k"), &costs())).unwrap();
        let broken = [
            "".to_owned(),
            good[..good.len() / 2].to_owned(),
            good.replace("\"k\"", "\"other\""),
            good.replace("[1,0.001]", "[1,-0.001]"),
            good.replace("[1,0.001]", "[9,0.001]"),
            good.replace("\"lookup\":1e-6", "\"lookup\":null"),
        ];
        for text in broken {
            assert_ne!(text, good);
            std::fs::write(&path, &text).unwrap();
            let mut measured = false;
            let measure = || {
                measured = true;
                Ok(costs())
            };
            cached_in(Some(dir.path()), &key("k"), measure, silent).unwrap();
            assert!(measured, "{text}");
            assert!(read(&path, &key("k")).is_some(), "replaced after {text}");
        }
    }

    #[test]
    fn a_place_that_cannot_be_written_is_said_and_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let mut said = String::new();
        let found = cached_in(Some(&file), &key("k"), || Ok(costs()), |why| said = why.to_owned());
        assert_eq!(found.unwrap(), costs());
        assert!(said.contains("not kept"), "{said}");
        assert_eq!(cached_in(None, &key("k"), || Ok(costs()), silent).unwrap(), costs());
    }
}
