//! The compile gate of the CUDA kernels: every source, for every generation of devices, on any machine.
//!
//! Needs NVIDIA's compiler but no GPU: found as a user's would be, or named by FORETOKEN_NVRTC. What
//! was compiled is inspected by `cuobjdump`, where the variable CUOBJDUMP names it. `tests/cuda/run.sh`
//! brings both. Not here: whether results are right (kernels' own tests, on a processor).

use kernels::cuda::{Arch, Nvrtc, Places};
use shaders::Source;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What kernels are compiled for on a device of each generation, oldest first.
const ARCHS: [Arch; 7] = [
    Arch::new(75),
    Arch::new(80),
    Arch::new(86),
    Arch::new(89),
    Arch::own(90),
    Arch::new(100),
    Arch::new(120),
];
/// Kernels that may have bytes of memory a thread beside registers, with the architecture and how many.
const SPILLS: [(&str, u32, u32); 4] = [
    // A pair of registers beside 128, with which two blocks fit into a multiprocessor.
    ("linear_w4_s64_m64", 120, 8),
    // NVRTC 12.9 alone.
    ("gemm_w8_s32", 120, 8),
    // NVRTC 12.9 keeps the digits of 2 / pi in memory, with which angles beyond 105615 are reduced.
    ("rope", 90, 32),
    ("heads", 90, 32),
];
/// How kernels' names begin, the oldest architecture, and an instruction that such kernels must have.
const INSTRUCTIONS: [(&str, u32, &str); 23] = [
    // int8 tensor instructions
    ("linear_w", 75, "IMMA"),
    ("gemm_w", 75, "IMMA"),
    // weights in loads of 16 bytes that leave the first-level cache alone
    ("linear_w4_s128", 80, WEIGHTS),
    ("linear_w4_s64", 80, WEIGHTS),
    ("linear_w8", 80, WEIGHTS),
    ("gemm_w4_s128", 80, WEIGHTS),
    ("gemm_w4_s64", 80, WEIGHTS),
    ("gemm_w8", 80, WEIGHTS),
    // copies to shared memory beside the arithmetic
    ("linear_w", 80, "LDGSTS.E.BYPASS.128"),
    ("gemm_w", 80, "LDGSTS.E.BYPASS.128"),
    ("attend_mma", 80, "LDGSTS.E.BYPASS.128"),
    // f16 tensor instructions, their operands from shared memory as they are and transposed
    ("attend_mma", 75, "HMMA"),
    ("attend_mma", 75, "LDSM.16.M88.4"),
    ("attend_mma", 75, "LDSM.16.MT88.4"),
    // powers of two by an instruction
    ("attend_mma", 75, "MUFU.EX2"),
    ("gemm_f16", 80, "LDGSTS.E.BYPASS.128"),
    ("gemm_bf16", 80, "LDGSTS.E.BYPASS.128"),
    // tensor instructions for floats
    ("linear_f16", 75, "HMMA"),
    ("linear_bf16", 80, "HMMA.16816.F32.BF16"),
    ("gemm_f16", 75, "HMMA"),
    ("gemm_bf16", 80, "HMMA.16816.F32.BF16"),
    ("linear_f16", 80, WEIGHTS),
    // waiting for the launches before
    ("", 90, AWAIT),
];
const WEIGHTS: &str = ".NA.LTC128B.128";
/// Waits for the launches before, and lets the next one start.
const AWAIT: &str = "ACQBULK";
const LET_START: &str = "PREEXIT";
/// How the names begin of kernels that ask for their first weights before they wait.
const EARLY: [&str; 2] = ["linear_w", "gemm_w"];

/// The compiler, or the reason why there is none, printed.
fn compiler() -> Option<Nvrtc> {
    let places = Places::new(|name| std::env::var_os(name), None);
    match Nvrtc::find(&places, None) {
        Ok(nvrtc) => {
            println!("{nvrtc:?}");
            Some(nvrtc)
        }
        Err(error) => {
            // Whoever names a compiler wants it used.
            assert!(std::env::var_os(kernels::cuda::VARIABLE).is_none(), "{error}");
            println!("skipped: {error}");
            None
        }
    }
}

/// What one kernel became.
#[derive(Debug, Default)]
struct Kernel {
    registers: u32,
    /// Bytes of a thread's own memory: spilled registers, arrays.
    stack: u32,
    /// Instructions, a line each.
    code: String,
}

/// Number behind `key` in a line such as `REG:32 STACK:0 SHARED:1024 LOCAL:0`.
fn number(line: &str, key: &str) -> Option<u32> {
    let rest = line.split_whitespace().find_map(|word| word.strip_prefix(key))?;
    rest.parse().ok()
}

/// Name behind `Function` in a line of cuobjdump's.
fn function(line: &str) -> Option<&str> {
    let rest = line.trim().strip_prefix("Function")?;
    Some(rest.trim_start_matches([' ', ':']).trim_end_matches(':'))
}

fn cuobjdump(tool: &Path, option: &str, file: &Path) -> String {
    let done = Command::new(tool).arg(option).arg(file).output();
    let done = done.unwrap_or_else(|error| panic!("{}: {error}", tool.display()));
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{} {option}: {said}", tool.display());
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// The kernels of a CUBIN by name.
fn inspect(tool: &Path, cubin: &[u8]) -> BTreeMap<String, Kernel> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("kernels.cubin");
    std::fs::write(&file, cubin).expect("a file");
    let mut kernels: BTreeMap<String, Kernel> = BTreeMap::new();
    let mut current = None;
    for line in cuobjdump(tool, "-res-usage", &file).lines() {
        current = function(line).map(str::to_owned).or(current);
        if let (Some(name), Some(registers)) = (&current, number(line, "REG:")) {
            let own = ["STACK:", "LOCAL:"].map(|key| number(line, key).expect("bytes"));
            let kernel = Kernel { registers, stack: own.iter().sum(), code: String::new() };
            kernels.insert(name.clone(), kernel);
        }
    }
    let mut current = None;
    for line in cuobjdump(tool, "-sass", &file).lines() {
        current = function(line).map(str::to_owned).or(current);
        if let Some(kernel) = current.as_ref().and_then(|name| kernels.get_mut(name)) {
            kernel.code.push_str(line);
            kernel.code.push('\n');
        }
    }
    kernels
}

/// What is wrong with a kernel.
fn complaints(name: &str, arch: Arch, kernel: &Kernel) -> Vec<String> {
    let may = SPILLS.iter().find(|(kernel, on, _)| *kernel == name && *on == arch.number());
    let spills = kernel.stack > may.map_or(0, |(_, _, bytes)| *bytes);
    let spills = spills.then(|| format!("{name} takes {} bytes of memory a thread", kernel.stack));
    let wanted = INSTRUCTIONS
        .iter()
        .filter(|(start, oldest, _)| name.starts_with(start) && arch.number() >= *oldest);
    let missing = wanted
        .filter(|(_, _, instruction)| !kernel.code.contains(instruction))
        .map(|(_, _, instruction)| format!("{name} has no {instruction}"));
    let late = EARLY.iter().any(|start| name.starts_with(start)) && is_late(&kernel.code);
    let late = late.then(|| format!("{name} asks for weights behind {AWAIT}"));
    spills.into_iter().chain(missing).chain(late).collect()
}

/// Whether the compiler has moved loads of weights behind the wait for the launches before.
fn is_late(code: &str) -> bool {
    let Some((before, rest)) = code.split_once(AWAIT) else { return false };
    let wait = rest.split(LET_START).next().unwrap_or(rest);
    !before.contains(".LTC128B") || wait.contains(".LTC128B")
}

/// Compiles and inspects all sources for one architecture: what is wrong, and registers by kernel.
fn gate(nvrtc: &Nvrtc, tool: Option<&Path>, arch: Arch) -> (Vec<String>, BTreeMap<String, u32>) {
    let (mut wrong, mut registers) = (vec![], BTreeMap::new());
    for source in shaders::CUDA {
        let cubin = match nvrtc.compile(source, arch, &[]) {
            Ok(cubin) => cubin,
            Err(error) => {
                wrong.push(error.to_string());
                continue;
            }
        };
        let Some(tool) = tool else { continue };
        let kernels = inspect(tool, &cubin);
        assert!(!kernels.is_empty(), "{} has no kernels for {arch}", source.name);
        for (name, kernel) in kernels {
            let found = complaints(&name, arch, &kernel);
            wrong.extend(found.into_iter().map(|what| format!("{arch} {}: {what}", source.name)));
            registers.insert(name, kernel.registers);
        }
    }
    (wrong, registers)
}

#[test]
fn every_kernel_compiles_for_every_generation() {
    let Some(nvrtc) = compiler() else { return };
    let tool = std::env::var_os("CUOBJDUMP").map(PathBuf::from);
    if tool.is_none() {
        println!("machine code is not inspected: CUOBJDUMP names no tool");
    }
    let gates = std::thread::scope(|scope| {
        let (nvrtc, tool) = (&nvrtc, tool.as_deref());
        let one = |arch| scope.spawn(move || gate(nvrtc, tool, arch));
        ARCHS.map(one).map(|thread| thread.join().expect("a thread"))
    });
    let mut table: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for (kernel, registers) in gates.iter().flat_map(|(_, registers)| registers) {
        table.entry(kernel.clone()).or_default().push(*registers);
    }
    println!("registers for {}", ARCHS.map(|arch| arch.to_string()).join(" "));
    for (kernel, registers) in &table {
        println!("{kernel:<24} {registers:?}");
    }
    let wrong: Vec<String> = gates.into_iter().flat_map(|(wrong, _)| wrong).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let names = INSTRUCTIONS.iter().map(|(start, ..)| start).chain(SPILLS.iter().map(|(n, ..)| n));
    for start in names.filter(|_| !table.is_empty()) {
        assert!(table.keys().any(|name| name.starts_with(start)), "no kernel is named {start}");
    }
}

#[test]
fn a_wrong_source_is_refused_with_its_line() {
    let Some(nvrtc) = compiler() else { return };
    let refuse = |text, arch| {
        let source = Source { name: "cuda/wrong.cu", text };
        nvrtc.compile(&source, arch, &[]).expect_err("is wrong").to_string()
    };
    let said = refuse("FT_KERNEL(32) f(int* x) {\n    *x = y;\n}\n", Arch::new(80));
    assert!(said.contains("cuda/wrong.cu(2)") && said.contains("\"y\""), "{said}");
    let said = refuse("FT_KERNEL(32) f(int* x) {}", Arch::new(31));
    assert!(said.contains("sm_31") && said.contains("arch"), "{said}");
    let said = refuse("zero \0 inside", Arch::new(80));
    assert!(said.contains("cannot be compiled"), "{said}");
}

#[test]
fn defines_reach_the_source() {
    let Some(nvrtc) = compiler() else { return };
    let text = "#if WIDTH != 3\n#error no width\n#endif\nFT_KERNEL(32) f(int* x) {}\n";
    let source = Source { name: "cuda/defined.cu", text };
    assert!(nvrtc.compile(&source, Arch::new(86), &["WIDTH=3"]).is_ok());
    let said = nvrtc.compile(&source, Arch::new(86), &[]).expect_err("undefined").to_string();
    assert!(said.contains("no width"), "{said}");
}

#[test]
fn what_cuobjdump_prints_is_understood() {
    let line = "  REG:32 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:400 TEXTURE:0";
    assert_eq!(number(line, "REG:"), Some(32));
    assert_eq!(number(line, "STACK:"), Some(16));
    assert_eq!(function(" Function rope:"), Some("rope"));
    assert_eq!(function("\t\tFunction : rms_norm"), Some("rms_norm"));
}

#[test]
fn spills_and_missing_instructions_are_found() {
    let complain = |name, arch, stack, code: &str| {
        complaints(name, Arch::new(arch), &Kernel { registers: 1, stack, code: code.to_owned() })
    };
    assert_eq!(complain("gather", 80, 0, ""), [""; 0]);
    assert_eq!(complain("gather", 80, 8, "").len(), 1);
    assert_eq!(complain("gather", 90, 0, ""), ["gather has no ACQBULK"]);
    assert_eq!(complain("rope", 90, 32, "ACQBULK"), [""; 0]);
    assert_eq!(complain("rope", 90, 33, "ACQBULK").len(), 1);
    let turing = "IMMA.8816.U8.S8 LDG.E.128.CONSTANT.SYS";
    assert_eq!(complain("gemm_w4_s64", 75, 0, turing), [""; 0]);
    assert_eq!(complain("gemm_w4_s64", 80, 0, turing).len(), 2, "no copies, no load of weights");
    let copies = "LDGSTS.E.BYPASS.128";
    assert_eq!(complain("linear_w4_s32_m8", 80, 0, copies), ["linear_w4_s32_m8 has no IMMA"]);
    let early = format!("{copies} LDG.E.NA.LTC128B.128 ACQBULK PREEXIT IMMA");
    assert_eq!(complain("linear_w8_s64_m8", 90, 0, &early), [""; 0]);
    let late = format!("{copies} LDG.E.NA.LTC128B.128 ACQBULK LDG.E.NA.LTC128B.128 PREEXIT IMMA");
    assert_eq!(complain("linear_w8_s64_m8", 90, 0, &late).len(), 1);
}
