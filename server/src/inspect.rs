//! `foretoken inspect`: what a model is before it runs; reads headers and configs, no weights.

use crate::Io;
use crate::cli::{DeviceArgs, DeviceName, HeadName, InspectArgs};
use crate::{generate, load};
use engine::kv::BLOCK_LEN;
use engine::model::Model;
use kernels::backend::RunnerMemory;
use kernels::program::Op;
use kernels::{Backend, Program, StepLimits, cuda};
use quant::Format;
use serde_json::{Value, json};

/// Runs the command.
pub(crate) fn run(args: &InspectArgs, io: &mut Io<'_>) -> anyhow::Result<()> {
    let cpu = device(DeviceName::Cpu, Some(args.head));
    let model = load::open(&args.model, load::head(args.head, DeviceName::Cpu))?;
    let backends = [cpu, device(DeviceName::Cuda(0), None), device(DeviceName::Reference, None)];
    let backends = backends.iter().map(load::backend).collect::<anyhow::Result<Vec<_>>>()?;
    if args.json {
        writeln!(io.out, "{}", describe(&model, &backends, args.plan))?;
        return Ok(());
    }
    print_summary(&model, io)?;
    print_modules(&model, io)?;
    print_kernels(&model, &backends, io)?;
    print_gpu_memory(&GpuMemory::of(&model), io)?;
    if args.plan {
        write!(io.out, "\nplan\n{}", model.program())?;
    }
    Ok(())
}

fn device(device: DeviceName, head: Option<HeadName>) -> DeviceArgs {
    DeviceArgs { device, threads: None, cpu_isa: None, head }
}

/// Format and bytes of the matrix that makes the logits.
fn head(program: &Program) -> Option<(Format, usize)> {
    program.steps.iter().rev().find_map(|step| match step.op {
        Op::Linear { weight, .. } => {
            let decl = &program.weights[weight.index()];
            Some((decl.format, decl.format.bytes(decl.shape)))
        }
        _ => None,
    })
}

fn print_summary(model: &Model, io: &mut Io<'_>) -> anyhow::Result<()> {
    let (spec, program) = (model.spec(), model.program());
    let kv = program.kv_elements_per_token();
    writeln!(
        io.out,
        "{}: {} layers, width {}, vocabulary {}, context {} tokens",
        spec.architecture,
        spec.layers.len(),
        spec.width,
        spec.vocab,
        spec.context_len
    )?;
    writeln!(io.out, "weights      {:>14} bytes", program.weight_bytes())?;
    writeln!(io.out, "read a token {:>14} bytes", program.bytes_per_token())?;
    if let Some((format, bytes)) = head(program) {
        writeln!(io.out, "of this, head {bytes:>13} bytes ({format})")?;
    }
    writeln!(io.out, "KV a token   {:>14} bytes (f16; {} as f32)", kv * 2, kv * 4)?;
    Ok(())
}

fn print_modules(model: &Model, io: &mut Io<'_>) -> anyhow::Result<()> {
    writeln!(io.out, "\ntensors")?;
    for module in model.modules() {
        let [n, k] = module.shape;
        let bytes = module.format.bytes(module.shape);
        let (name, source) = (&module.name, &module.source);
        writeln!(io.out, "  {name:<48} {n:>7} x {k:<7} {bytes:>12} B  {source}")?;
    }
    Ok(())
}

/// Distinct formats of the program's weights, in order of appearance.
pub(crate) fn formats(model: &Model) -> Vec<Format> {
    let mut all = vec![];
    for weight in &model.program().weights {
        if weight.shape[0] > 1 && !all.contains(&weight.format) {
            all.push(weight.format);
        }
    }
    all
}

fn print_kernels(
    model: &Model,
    backends: &[Box<dyn Backend>],
    io: &mut Io<'_>,
) -> anyhow::Result<()> {
    writeln!(io.out, "\nkernels")?;
    for format in formats(model) {
        for backend in backends {
            let (name, kernel) = (backend.name(), backend.kernel_for(format));
            writeln!(io.out, "  {:<16} {name:<10} {kernel}", format.to_string())?;
        }
    }
    writeln!(io.out, "  wgpu: not built yet")?;
    Ok(())
}

/// Sizes of GPUs for which it is told what would fit where none is at hand.
const ROOMS_GIB: [usize; 3] = [8, 16, 24];

/// What a model takes on a GPU, for one sequence of the whole context.
struct GpuMemory {
    limits: StepLimits,
    /// What it takes, or why it cannot run there.
    needed: Result<RunnerMemory, String>,
    /// Names of memories, the bytes that are free there, and how many tokens fit.
    rooms: Vec<(String, usize, usize)>,
}

impl GpuMemory {
    fn of(model: &Model) -> Self {
        let (spec, program) = (model.spec(), model.program());
        let limits = generate::config(spec, spec.context_len as usize, 0, 0).step_limits();
        let needed = cuda::memory(program, &limits).map_err(|error| error.to_string());
        let fit = |free| cuda::tokens_that_fit(&[(program, limits)], free).unwrap_or(0);
        let rooms = rooms().into_iter().map(|(name, free)| (name, free, fit(free))).collect();
        Self { limits, needed, rooms }
    }
}

/// The GPUs of this machine and what is free there; some sizes where there is none.
fn rooms() -> Vec<(String, usize)> {
    match cuda::devices() {
        Ok(found) => {
            let room =
                |gpu: cuda::DeviceInfo| (format!("cuda:{} {}", gpu.index, gpu.name), gpu.free);
            found.into_iter().map(room).collect()
        }
        Err(_) => ROOMS_GIB.map(|gib| (format!("{gib} GiB"), gib << 30)).into(),
    }
}

fn print_gpu_memory(memory: &GpuMemory, io: &mut Io<'_>) -> anyhow::Result<()> {
    writeln!(io.out, "\nmemory on a GPU")?;
    let needed = match &memory.needed {
        Ok(needed) => needed,
        Err(why) => return Ok(writeln!(io.out, "  {why}")?),
    };
    let (tokens, blocks) = (memory.limits.tokens, memory.limits.blocks);
    let context = blocks * BLOCK_LEN;
    writeln!(io.out, "  weights            {:>14} bytes", needed.weights_bytes)?;
    writeln!(
        io.out,
        "  between steps      {:>14} bytes (steps of {tokens} tokens)",
        needed.slots_bytes
    )?;
    writeln!(
        io.out,
        "  keys and values    {:>14} bytes ({context} tokens, {} a block of {BLOCK_LEN})",
        needed.kv_bytes,
        needed.kv_bytes / blocks.max(1)
    )?;
    for (name, free, tokens) in &memory.rooms {
        let free = *free as f64 / f64::from(1 << 30);
        let fit = match *tokens {
            0 => "too small for the model".to_owned(),
            tokens if tokens >= context => "the whole context fits".to_owned(),
            tokens => format!("{tokens} tokens fit"),
        };
        writeln!(io.out, "  {name:<32} {free:>6.1} GiB free: {fit}")?;
    }
    Ok(())
}

fn describe_gpu_memory(memory: &GpuMemory) -> Value {
    let rooms = memory.rooms.iter();
    let rooms =
        rooms.map(|(name, free, tokens)| json!({"name": name, "free": free, "tokens": tokens}));
    let rooms: Vec<Value> = rooms.collect();
    match &memory.needed {
        Err(why) => json!({"unavailable": why}),
        Ok(needed) => json!({
            "weight_bytes": needed.weights_bytes,
            "workspace_bytes": needed.slots_bytes,
            "kv_bytes": needed.kv_bytes,
            "kv_tokens": memory.limits.blocks * BLOCK_LEN,
            "step_tokens": memory.limits.tokens,
            "rooms": rooms,
        }),
    }
}

fn describe(model: &Model, backends: &[Box<dyn Backend>], plan: bool) -> Value {
    let (spec, program) = (model.spec(), model.program());
    let modules: Vec<Value> = model
        .modules()
        .iter()
        .map(|m| {
            json!({
                "name": m.name,
                "shape": m.shape,
                "format": m.format.to_string(),
                "source": m.source,
                "bytes": m.format.bytes(m.shape),
            })
        })
        .collect();
    let kernels: Vec<Value> = formats(model)
        .into_iter()
        .flat_map(|f| backends.iter().map(move |b| (f, b)))
        .map(|(f, b)| {
            json!({"format": f.to_string(), "device": b.name(), "kernel": b.kernel_for(f)})
        })
        .collect();
    json!({
        "architecture": spec.architecture,
        "layers": spec.layers.len(),
        "width": spec.width,
        "vocab": spec.vocab,
        "context_len": spec.context_len,
        "weight_bytes": program.weight_bytes(),
        "bytes_per_token": program.bytes_per_token(),
        "head": head(program).map(|(f, bytes)| json!({"format": f.to_string(), "bytes": bytes})),
        "kv_bytes_per_token": program.kv_elements_per_token() * 2,
        "tensors": modules,
        "kernels": kernels,
        "gpu_memory": describe_gpu_memory(&GpuMemory::of(model)),
        "plan": plan.then(|| program.to_string()),
    })
}
