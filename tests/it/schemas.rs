//! The JSON Schema test suite against guides: what a schema's guide lets pass must be valid by it.
//!
//! Input: `shared/corpora/json-schema` (skipped with a printed reason where it is absent), and an
//! independent validator. A guide may be stricter than its schema (it has the properties of objects in
//! the schema's order, for one) and may be refused, with a reason.

use engine::grammar::{GrammarSource, Grammars, Guide};
use jsonschema::{Draft, Validator};
use kernels::program::TokenId;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use testkit::Rng;

/// Folder, draft and the name that a schema has to give for it.
const DRAFTS: [(&str, Draft, &str); 5] = [
    ("draft4", Draft::Draft4, "http://json-schema.org/draft-04/schema#"),
    ("draft6", Draft::Draft6, "http://json-schema.org/draft-06/schema#"),
    ("draft7", Draft::Draft7, "http://json-schema.org/draft-07/schema#"),
    ("draft2019-09", Draft::Draft201909, "https://json-schema.org/draft/2019-09/schema"),
    ("draft2020-12", Draft::Draft202012, "https://json-schema.org/draft/2020-12/schema"),
];
/// Ends a text; the other tokens are the bytes.
const END: TokenId = TokenId(256);
/// What passes although the suite says that it is invalid, by the beginning of its name.
const EXCEPTIONS: [(&str, &str); 1] = [(
    "Draft7 optional/content.json",
    "contentEncoding and contentMediaType are annotations, as all later drafts have it",
)];
/// Random texts of each schema.
const TEXTS: u64 = 4;
/// Bytes after which a random text is closed as fast as the grammar allows, and given up.
const LONG: usize = 200;
const TOO_LONG: usize = 1000;

#[derive(Debug, Default)]
struct Counts {
    schemas: usize,
    refused: usize,
    valid: usize,
    valid_accepted: usize,
    invalid: usize,
    texts: usize,
    unfinished: usize,
    reasons: std::collections::BTreeMap<String, usize>,
}

/// What is wrong, one line each.
type Faults = Vec<String>;

fn suite() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/corpora/json-schema/tests");
    if dir.is_dir() {
        return Some(dir);
    }
    println!("skipped: no JSON Schema test suite at {}", dir.display());
    None
}

/// All files below `folder`, in order.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path());
    let mut all: Vec<PathBuf> =
        entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect();
    all.sort();
    all
}

/// Every byte and an end.
fn grammars() -> Grammars {
    let bytes = (0..=255u8).map(|byte| vec![byte]);
    let words: Vec<Vec<u8>> = bytes.chain([b"\xff</s>".to_vec()]).collect();
    Grammars::from_words(&words, &[END]).expect("a vocabulary")
}

/// Ids that may come next.
fn next(guide: &mut Guide) -> Result<Vec<u32>, String> {
    let mut row_v = vec![0.0; 257];
    guide.mask(&mut row_v)?;
    Ok((0..).zip(row_v).filter(|(_, logit)| *logit == 0.0).map(|(id, _)| id).collect())
}

/// Whether `text` passes as a whole.
fn passes(guide: &Guide, text: &str) -> bool {
    let mut guide = guide.clone();
    let tokens: Vec<TokenId> = text.bytes().map(|byte| TokenId(byte.into())).collect();
    if guide.accepts(&tokens) < tokens.len() {
        return false;
    }
    tokens.iter().for_each(|&token| guide.push(token));
    guide.is_over() || next(&mut guide).is_ok_and(|next| next.contains(&END.0))
}

/// A random text, which may lack its end.
fn write(guide: &Guide, seed: u64) -> Result<(String, bool), String> {
    let (mut guide, mut rng, mut text) = (guide.clone(), Rng::new(seed), vec![]);
    while !guide.is_over() && text.len() < TOO_LONG {
        let next = next(&mut guide)?;
        let hurry = text.len() > LONG || rng.below(3) == 0;
        if next == [END.0] || next.contains(&END.0) && hurry {
            guide.push(END);
            break;
        }
        let next: Vec<u8> = next.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
        let close: Vec<u8> = next.iter().copied().filter(|b| b"\"}]".contains(b)).collect();
        let plain: Vec<u8> = next.iter().copied().filter(|b| (33..127).contains(b)).collect();
        let from = match () {
            () if hurry && !close.is_empty() => close,
            () if rng.below(10) > 0 && !plain.is_empty() => plain,
            () => next,
        };
        let byte = from[rng.below(from.len())];
        text.push(byte);
        guide.push(TokenId(byte.into()));
    }
    let text = String::from_utf8(text).map_err(|e| e.to_string());
    Ok((text.unwrap_or_default(), guide.is_over()))
}

/// Tries one schema; `name` says where it is from.
fn examine(
    grammars: &Grammars,
    name: &str,
    case: &Value,
    validator: Option<&Validator>,
    counts: &mut Counts,
) -> Faults {
    counts.schemas += 1;
    let guide = match grammars.guide(&GrammarSource::JsonSchema(case["schema"].clone())) {
        Ok(guide) => guide,
        Err(reason) => {
            counts.refused += 1;
            let reason = reason.to_string();
            *counts.reasons.entry(reason.clone()).or_default() += 1;
            let sound = !reason.is_empty() && !reason.contains('\n') && reason.len() < 400;
            return if sound { vec![] } else { vec![format!("{name}: refused by {reason:?}")] };
        }
    };
    let mut faults = vec![];
    for test in case["tests"].as_array().into_iter().flatten() {
        let data = &test["data"];
        let pretty = serde_json::to_string_pretty(data).expect("JSON");
        let passes = passes(&guide, &data.to_string()) || passes(&guide, &pretty);
        if test["valid"] == true {
            counts.valid += 1;
            counts.valid_accepted += usize::from(passes);
        } else {
            counts.invalid += 1;
            if passes {
                faults.push(format!("{name}: {data} passes ({})", test["description"]));
            }
        }
    }
    for seed in 0..TEXTS {
        counts.texts += 1;
        match write(&guide, seed) {
            Ok((_, false)) => counts.unfinished += 1,
            Ok((text, true)) => {
                faults.extend(wrong(&text, validator).map(|e| format!("{name}: {e}")))
            }
            Err(reason) => faults.push(format!("{name}: a dead end: {reason}")),
        }
    }
    faults
}

/// What is wrong with a text that was written by a guide.
fn wrong(text: &str, validator: Option<&Validator>) -> Option<String> {
    match serde_json::from_str::<Value>(text) {
        // JSON's numbers have no largest one; the validator's do.
        Err(e) if e.to_string().contains("out of range") => None,
        Err(e) => Some(format!("{text:?} is not JSON: {e}")),
        // The validator rounds numbers to 53 bits before it divides them by `multipleOf`.
        Ok(_) if text.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 15) => None,
        Ok(value) => {
            let e = validator?.validate(&value).err()?;
            Some(format!("{text:?} is invalid: {e}"))
        }
    }
}

/// Tries all schemas of a draft.
fn draft(dir: &Path, draft: Draft, schema_name: &str, counts: &mut Counts) -> Faults {
    let (grammars, mut faults) = (grammars(), vec![]);
    for file in files(dir) {
        let text = std::fs::read_to_string(&file).expect("a text file");
        let mut cases: Vec<Value> = serde_json::from_str(&text).expect("a list of cases");
        let file = file.strip_prefix(dir).expect("a file within").display().to_string();
        for case in &mut cases {
            let name = format!("{draft:?} {file}: {}", case["description"]);
            if let Value::Object(schema) = &mut case["schema"] {
                schema.entry("$schema").or_insert(json!(schema_name));
            }
            let options = jsonschema::options().with_draft(draft).should_validate_formats(true);
            let validator = options.build(&case["schema"]).ok();
            faults.extend(examine(&grammars, &name, case, validator.as_ref(), counts));
        }
    }
    faults
}

#[test]
fn what_a_guide_lets_pass_is_valid() {
    let Some(suite) = suite() else { return };
    let mut faults = vec![];
    for (folder, of, schema_name) in DRAFTS {
        let mut counts = Counts::default();
        faults.extend(draft(&suite.join(folder), of, schema_name, &mut counts));
        println!("{folder}: {counts:#?}");
    }
    for (name, reason) in EXCEPTIONS {
        let before = faults.len();
        faults.retain(|fault| !fault.starts_with(name));
        assert!(faults.len() < before, "{name} needs no exception: {reason}");
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}
