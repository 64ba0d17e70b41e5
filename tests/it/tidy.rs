//! The repository's own rules, so that they cannot rot: sizes, layering, words.
//!
//! Works on the text of the sources; no parser, so each rule is a simple one.

use std::path::{Path, PathBuf};

const FUNCTION_LINES: usize = 70;
const FILE_LINES: usize = 600;
/// Names of model families, which only the engine's table may know.
const FAMILIES: [&str; 6] = ["llama", "mistral", "qwen", "gemma", "falcon", "phi3"];
/// Configuration keys that hold such a name and are merely read.
const KEYS: [&str; 4] = ["is_llama_config", "use_exllama", "disable_exllama", "exllama_config"];
/// Names of checkpoint formats, which only importers and the engine may know.
const FORMATS: [&str; 3] = ["gptq", "awq", "compressed-tensors"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the repository")
}

/// Every file below `folder` with extension `ext`, with its text.
fn sources(folder: &str, ext: &str) -> Vec<(PathBuf, String)> {
    let (mut found, mut folders) = (vec![], vec![root().join(folder)]);
    while let Some(dir) = folders.pop() {
        for entry in std::fs::read_dir(&dir).expect("a folder").map_while(Result::ok) {
            let path = entry.path();
            if path.is_dir() {
                if !path.ends_with("target") && !path.ends_with("golden") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|e| e == ext) {
                let text = std::fs::read_to_string(&path).expect("a text file");
                found.push((path, text));
            }
        }
    }
    found
}

fn rust() -> Vec<(PathBuf, String)> {
    ["quant", "shaders", "kernels", "engine", "server", "benches", "tests"]
        .iter()
        .flat_map(|folder| sources(folder, "rs"))
        .collect()
}

/// Source lines outside comments.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line.split("//").next().unwrap_or("")))
        .filter(|(_, line)| !line.trim().is_empty())
}

fn assert_none(rule: &str, found: &[String]) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

/// Lines of code of `folder` that hold one of `words`, except in files that `allowed` accepts.
fn mentions(folder: &str, words: &[&str], allowed: impl Fn(&Path) -> bool) -> Vec<String> {
    let mut found = vec![];
    for (path, text) in sources(folder, "rs") {
        if allowed(&path) {
            continue;
        }
        for (line, text) in code(&text) {
            let text = text.to_lowercase();
            if words.iter().any(|w| text.contains(w)) {
                found.push(format!("{}:{line}: {}", path.display(), text.trim()));
            }
        }
    }
    found
}

#[test]
fn files_are_short() {
    let long = |(path, text): &(PathBuf, String)| {
        let lines = text.lines().count();
        (lines > FILE_LINES).then(|| format!("{}: {lines} lines", path.display()))
    };
    let found: Vec<String> = rust().iter().filter_map(long).collect();
    assert_none("files have at most 600 lines", &found);
}

/// Functions of a formatted source: (line, name, lines), by the indentation of their last brace.
fn functions(text: &str) -> Vec<(usize, String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = vec![];
    for (start, line) in lines.iter().enumerate() {
        let trimmed = line.trim_start();
        let Some(at) = trimmed.find("fn ") else { continue };
        let before = &trimmed[..at];
        let keywords = ["pub", "pub(crate)", "pub(super)", "const", "unsafe", "async", "extern"];
        if !before.split_whitespace().all(|w| keywords.contains(&w) || w.starts_with('"')) {
            continue;
        }
        let indent = &line[..line.len() - trimmed.len()];
        let close = format!("{indent}}}");
        let opens = |l: &&&str| l.ends_with('{') || l.ends_with(';') || l.ends_with('}');
        let signature = lines[start..].iter().find(opens);
        if !signature.is_some_and(|l| l.ends_with('{')) {
            continue; // a declaration, or a body on the same line
        }
        if let Some(len) = lines[start..].iter().position(|l| *l == close) {
            let is_name = |c: &char| c.is_alphanumeric() || *c == '_';
            let name: String = trimmed[at + 3..].chars().take_while(is_name).collect();
            found.push((start + 1, name, len + 1));
        }
    }
    found
}

#[test]
fn functions_are_short() {
    let mut found = vec![];
    let mut all = vec![];
    for (path, text) in rust() {
        for (line, name, lines) in functions(&text) {
            all.push(lines);
            if lines > FUNCTION_LINES {
                found.push(format!("{}:{line}: {name} has {lines} lines", path.display()));
            }
        }
    }
    all.sort_unstable();
    let at = |share: usize| all[all.len() * share / 100];
    println!("{} functions, median {} lines, 90th percentile {}", all.len(), at(50), at(90));
    assert!(all.len() > 300, "the rule sees only {} functions", all.len());
    assert_none("functions have at most 70 lines", &found);
}

#[test]
fn every_file_says_what_it_is_for() {
    let silent = |(path, text): &(PathBuf, String)| {
        (!text.starts_with("//!")).then(|| path.display().to_string())
    };
    let found: Vec<String> = rust().iter().filter_map(silent).collect();
    assert_none("every file opens with //!", &found);
}

#[test]
fn kernels_name_no_model_family() {
    assert_none("families stay in the engine", &mentions("kernels/src", &FAMILIES, |_| false));
    assert_none("formats stay in quant", &mentions("kernels/src", &FORMATS, |_| false));
}

#[test]
fn only_families_name_families() {
    let allowed = |path: &Path| {
        let text = path.to_string_lossy().replace('\\', "/");
        text.contains("engine/src/families") || text.contains("tests")
    };
    let named: Vec<String> = mentions("engine/src", &FAMILIES, allowed)
        .into_iter()
        .filter(|line| !KEYS.iter().any(|key| line.contains(key)))
        .filter(|line| !in_tests(line))
        .collect();
    assert_none("family names stay in engine/src/families", &named);
}

/// Whether `path:line: text` lies behind the `#[cfg(test)]` of its file.
fn in_tests(found: &str) -> bool {
    let mut parts = found.splitn(3, ':');
    let (Some(path), Some(line)) = (parts.next(), parts.next()) else { return false };
    let text = std::fs::read_to_string(path).expect("a source");
    let tests = text.lines().position(|l| l.trim() == "#[cfg(test)]").unwrap_or(usize::MAX);
    line.parse::<usize>().is_ok_and(|line| line > tests)
}

#[test]
fn dependencies_point_one_way() {
    let rules: [(&str, &[&str]); 4] = [
        ("quant", &["kernels", "engine", "server", "rayon", "memmap2", "serde"]),
        ("kernels", &["engine", "server", "safetensors", "tokenizers", "serde"]),
        ("engine", &["server", "cudarc", "wgpu", "rayon", "tokio", "clap", "axum"]),
        ("shaders", &["quant", "kernels", "engine", "server"]),
    ];
    let mut found = vec![];
    for (folder, banned) in rules {
        let path = root().join(folder).join("Cargo.toml");
        let text = std::fs::read_to_string(&path).expect("a manifest");
        let deps = text.split("[dev-dependencies]").next().unwrap_or("");
        let deps = deps.split("[dependencies]").nth(1).unwrap_or("");
        for line in deps.lines() {
            let name = line.split(['.', ' ', '=']).next().unwrap_or("");
            if banned.contains(&name) {
                found.push(format!("{folder} depends on {name}"));
            }
        }
    }
    assert_none("quant <- kernels <- engine <- server", &found);
}

#[test]
fn quant_and_engine_stay_free_of_the_world() {
    let io = ["std::fs", "std::thread", "std::env", "std::net", "std::time"];
    let tests = |found: Vec<String>| -> Vec<String> {
        found.into_iter().filter(|line| !in_tests(line)).collect()
    };
    let is_test = |path: &Path| path.to_string_lossy().contains("tests");
    assert_none("quant does no IO and has no threads", &tests(mentions("quant/src", &io, is_test)));
    let files = |path: &Path| {
        let name = path.to_string_lossy().replace('\\', "/");
        // Templates are rendered on a thread of their own, for its larger stack.
        let rendering = name.contains("engine/src/chat");
        path.ends_with("files.rs") || name.contains("checkpoint") || rendering || is_test(path)
    };
    let found = tests(mentions("engine/src", &io, files));
    assert_none("the engine opens files in two places and has no clock, threads or env", &found);
    // The GPU's compiler is looked for on disk, and what it compiled is kept there.
    let compiler = |path: &Path| {
        let name = path.to_string_lossy().replace('\\', "/");
        ["kernels/src/cuda/places.rs", "kernels/src/cuda/cache.rs"]
            .iter()
            .any(|n| name.ends_with(n))
    };
    let found = mentions("kernels/src", &["std::env", "std::fs"], |p| is_test(p) || compiler(p));
    assert_none("no environment variables and no files below the engine", &tests(found));
    let found = tests(mentions("kernels/src", &["env::var", "env::current"], is_test));
    assert_none("only the server reads the environment", &found);
}

#[test]
fn unsafe_stays_in_named_modules() {
    let named = [
        "kernels/src/cpu/x86",
        "kernels/src/cpu/pages.rs",
        "kernels/src/cpu/share.rs",
        "kernels/src/cpu/exec.rs",
        "kernels/src/cpu/team.rs",
        "kernels/src/cuda/api.rs",
        "kernels/src/cuda/devices.rs",
        "kernels/src/cuda/driver.rs",
        "kernels/src/cuda/library.rs",
        "kernels/src/cuda/nvrtc.rs",
        "engine/src/checkpoint/map.rs",
        "tests/alloc/counter.rs",
        "tests/emulator/src/ffi.rs",
    ];
    let mut found = vec![];
    for (path, text) in rust() {
        let name = path.to_string_lossy().replace('\\', "/");
        if named.iter().any(|n| name.contains(n)) || name.ends_with("tidy.rs") {
            continue;
        }
        let is_unsafe = |line: &str| line.contains("unsafe {") || line.contains("unsafe impl");
        for (line, text) in code(&text).filter(|(_, l)| is_unsafe(l)) {
            found.push(format!("{name}:{line}: {}", text.trim()));
        }
    }
    assert_none("unsafe code stays in its modules", &found);
}

#[test]
fn no_test_is_ignored_and_no_stub_is_left() {
    // Written in two halves so that this file does not find itself.
    let words = [concat!("#[ign", "ore"), concat!("to", "do!("), concat!("unimpl", "emented!(")];
    let mut found = vec![];
    for (path, text) in rust() {
        for (line, text) in code(&text) {
            if words.iter().any(|w| text.contains(w)) {
                found.push(format!("{}:{line}: {}", path.display(), text.trim()));
            }
        }
    }
    assert_none("nothing is left for later", &found);
}

#[test]
fn invariants_name_their_tests() {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let all: String = rust().into_iter().map(|(_, text)| text).collect();
    for i in 1..=10 {
        let start = format!("| I{i} |");
        let row = text.lines().find(|l| l.starts_with(&start));
        let row = row.unwrap_or_else(|| panic!("ARCHITECTURE.md lacks a row for I{i}"));
        let cell = row.trim_end_matches('|').rsplit('|').next().unwrap_or("");
        let tests: Vec<&str> = cell.split('`').skip(1).step_by(2).collect();
        assert!(!tests.is_empty(), "I{i} names no test");
        for test in tests {
            let name = test.rsplit("::").next().unwrap_or(test);
            assert!(all.contains(&format!("fn {name}(")), "I{i} names a missing test: {test}");
        }
    }
}
