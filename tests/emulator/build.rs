//! Compiles the CUDA kernels with the emulator, where there is a C++ compiler for it.
//!
//! Reads `shaders/cuda/*.cu` and `src/selftest.cu`; lists their kernels by looking at the
//! preprocessed text, so that macros may make kernels. Without a compiler, or for a processor that
//! the emulator does not run on, the crate is built without it and says why. An error in a kernel
//! is an error of the build. Not here: running anything.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// What `FT_KERNEL` becomes where kernels are listed.
const MARK: &str = "emulator_kernel";

fn main() {
    println!("cargo::rustc-check-cfg=cfg(emulated)");
    let missing = match find_compiler() {
        Err(reason) => reason.replace('\n', " "),
        Ok(()) => {
            if let Err(error) = compile() {
                println!("cargo::error={}", error.replace('\n', "\ncargo::error="));
            }
            String::new()
        }
    };
    println!("cargo::rustc-env=EMULATOR_MISSING={missing}");
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

fn here() -> PathBuf {
    PathBuf::from(variable("CARGO_MANIFEST_DIR"))
}

fn out(name: &str) -> PathBuf {
    Path::new(&variable("OUT_DIR")).join(name)
}

/// The flags of every compilation; a GPU rounds each operation by itself and has no rule about the
/// types behind pointers.
fn build() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).warnings(false);
    build.define("FT_EMULATED", None).include(here().join("src"));
    build.include(here().join("../../shaders/cuda")).flag("-U_FORTIFY_SOURCE");
    for flag in [
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-fwrapv",
        "-fno-exceptions",
        "-fvisibility=hidden",
    ] {
        build.flag(flag);
    }
    build
}

/// Why nothing can be compiled, if so.
fn find_compiler() -> Result<(), String> {
    let (arch, os) = (variable("CARGO_CFG_TARGET_ARCH"), variable("CARGO_CFG_TARGET_OS"));
    if arch != "x86_64" || os != "linux" {
        return Err(format!("the emulator runs on x86-64 Linux, not on {arch} {os}"));
    }
    let probe = out("probe.cpp");
    let text = "#include <vector>\ntemplate <auto F> int call() { return F(); }\n";
    std::fs::write(&probe, text).map_err(|e| e.to_string())?;
    let found =
        build().cargo_metadata(false).cargo_warnings(false).file(&probe).try_compile("probe");
    // Behind the first quote stands the whole command.
    let reason = |e: cc::Error| e.to_string().split('"').next().unwrap_or("").trim().to_owned();
    found.map_err(|e| format!("no C++17 compiler: {}", reason(e)))
}

/// Compiles all of it; an error is the compiler's text.
fn compile() -> Result<(), String> {
    let mut sources = vec![here().join("src/selftest.cu")];
    let folder = here().join("../../shaders/cuda");
    println!("cargo::rerun-if-changed={}", folder.display());
    println!("cargo::rerun-if-changed={}", here().join("src").display());
    println!("cargo::rerun-if-changed={}", here().join("build.rs").display());
    sources.extend(files_of(&folder, "cu")?);
    // The prelude stands outside of the files' namespaces, other headers within.
    let mut headers = files_of(&folder, "cuh")?;
    headers.retain(|path| !path.ends_with("prelude.cuh"));
    let mut names = vec![];
    let mut library = build();
    for source in &sources {
        let unit = unit_name(source);
        let kernels = list_kernels(source, &unit, &headers)?;
        names.extend(kernels.iter().map(|(_, name)| name.clone()));
        library.file(write(
            &format!("{unit}.cpp"),
            &unit_text(&unit, &includes(source, &headers), &kernels),
        )?);
    }
    refuse_duplicates(names)?;
    let units: Vec<String> = sources.iter().map(|source| unit_name(source)).collect();
    library.file(write("units.cpp", &table_text(&units))?);
    library.file(here().join("src/emulator.cpp"));
    library.try_compile("emulator").map_err(|e| e.to_string())?;
    println!("cargo::rustc-cfg=emulated");
    Ok(())
}

/// The files of a folder with extension `ext`, by name.
fn files_of(folder: &Path, ext: &str) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let paths = entries.map_while(Result::ok).map(|entry| entry.path());
    let mut files: Vec<PathBuf> =
        paths.filter(|p| p.extension().is_some_and(|e| e == ext)).collect();
    files.sort();
    Ok(files)
}

/// Includes headers and a source.
fn includes(source: &Path, headers: &[PathBuf]) -> String {
    let all = headers.iter().map(PathBuf::as_path).chain([source]);
    all.map(|path| format!("#include \"{}\"\n", path.display())).collect()
}

fn unit_name(source: &Path) -> String {
    source.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn write(name: &str, text: &str) -> Result<PathBuf, String> {
    let path = out(name);
    std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path)
}

/// The kernels of a file: how many threads they take, as an expression, and their names.
fn list_kernels(
    source: &Path,
    unit: &str,
    headers: &[PathBuf],
) -> Result<Vec<(String, String)>, String> {
    let includes = includes(source, headers);
    let text = format!(
        "#define FT_KERNEL(threads, ...) {MARK} (threads)\n#include \"prelude.cuh\"\n{includes}"
    );
    let file = write(&format!("{unit}.list.cpp"), &text)?;
    let expanded = build().file(file).try_expand().map_err(|e| e.to_string())?;
    let expanded = String::from_utf8_lossy(&expanded);
    // Line markers may stand anywhere between tokens.
    let lines = expanded.lines().filter(|line| !line.trim_start().starts_with('#'));
    let text = lines.collect::<Vec<_>>().join("\n");
    text.split(MARK).skip(1).map(|rest| kernel(rest, source)).collect()
}

/// Reads `(threads) name(`.
fn kernel(rest: &str, source: &Path) -> Result<(String, String), String> {
    let rest = rest.trim_start();
    let mut depth = 0;
    let end = rest.find(|c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        depth == 0
    });
    let parts = end.and_then(|end| {
        let (name, _) = rest[end + 1..].split_once('(')?;
        Some((rest[1..end].trim().to_owned(), name.trim().to_owned()))
    });
    let is_name = |name: &str| name.chars().all(|c| c.is_alphanumeric() || c == '_');
    let parts = parts.filter(|(_, name)| !name.is_empty() && is_name(name));
    parts.ok_or_else(|| format!("{}: no name behind an FT_KERNEL(threads)", source.display()))
}

/// A file's kernels and their table. A namespace of its own, since files repeat names.
fn unit_text(unit: &str, includes: &str, kernels: &[(String, String)]) -> String {
    let mut rows = String::new();
    for (threads, name) in kernels {
        let row = format!(
            "    emulator::kernel<&{name}>(\"{name}\", {threads}, __start_shared_{unit}, __stop_shared_{unit}),\n"
        );
        rows.push_str(&row);
    }
    format!(
        r#"#define EMULATOR_SHARED "shared_{unit}"
#include "emulator.h"
#include "prelude.h"
#include "prelude.cuh"
extern unsigned char __start_shared_{unit}[] __attribute__((weak));
extern unsigned char __stop_shared_{unit}[] __attribute__((weak));
namespace unit_{unit} {{
namespace {{
{includes}}}
emulator::Kernel kernels[] = {{
{rows}    {{}}}};
}}
"#
    )
}

/// The list of the files' tables.
fn table_text(units: &[String]) -> String {
    let mut text = "#include \"emulator.h\"\n".to_owned();
    for unit in units {
        let _ = writeln!(text, "namespace unit_{unit} {{ extern emulator::Kernel kernels[]; }}");
    }
    text.push_str("extern \"C\" const emulator::Kernel* emulator_kernels(unsigned unit) {\n");
    text.push_str("    static const emulator::Kernel* const units[] = {\n");
    for unit in units {
        let _ = writeln!(text, "        unit_{unit}::kernels,");
    }
    let _ =
        writeln!(text, "    }};\n    return unit < {} ? units[unit] : nullptr;\n}}", units.len());
    text
}

fn refuse_duplicates(mut names: Vec<String>) -> Result<(), String> {
    names.sort();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("two kernels have the name {}", pair[0])),
        None => Ok(()),
    }
}
