//! `foretoken devices`: what this machine offers and what is not there, with the reason.

use crate::cli::DevicesArgs;
use crate::{Io, environment, load};
use kernels::cpu::available_threads;
use kernels::devices::{Device, list, read_bandwidth};
use serde_json::json;

/// Runs the command.
pub(crate) fn run(args: &DevicesArgs, io: &mut Io<'_>) -> anyhow::Result<()> {
    let devices = list(&environment::cuda_compiler());
    let gpus: Vec<Option<Measured>> = devices.iter().map(Measured::of).collect();
    let threads = available_threads();
    let bandwidth = read_bandwidth(threads);
    if args.json {
        let rows = devices.iter().zip(&gpus).map(|(d, gpu)| {
            json!({
                "name": d.name,
                "available": d.unavailable.is_none(),
                "unavailable": d.unavailable,
                "features": d.features,
                "read_bytes_per_second": gpu.as_ref().map(|gpu| gpu.read),
                "int8_ops_per_second": gpu.as_ref().map(|gpu| gpu.int8),
            })
        });
        let rows: Vec<_> = rows.collect();
        let object =
            json!({"devices": rows, "threads": threads, "read_bytes_per_second": bandwidth});
        writeln!(io.out, "{object}")?;
        return Ok(());
    }
    for (device, gpu) in devices.into_iter().zip(gpus) {
        let state =
            device.unavailable.map_or("available".to_owned(), |why| format!("unavailable: {why}"));
        writeln!(io.out, "{:<12} {:<36} {state}", device.name, device.features)?;
        if let Some(Measured { read, int8 }) = gpu {
            let (read, int8) = (read / 1e9, int8 / 1e12);
            writeln!(io.out, "{:<12} reads {read:.0} GB/s, int8 {int8:.0} TOPS, now", "")?;
        }
    }
    writeln!(io.out, "read bandwidth {:.1} GB/s with {threads} threads, now", bandwidth / 1e9)?;
    Ok(())
}

/// What a GPU can do at most, measured.
struct Measured {
    /// Bytes per second.
    read: f64,
    /// Operations per second.
    int8: f64,
}

impl Measured {
    /// None for processors, and for what cannot be used; a GPU that fails says so.
    fn of(device: &Device) -> Option<Self> {
        let number = device.name.strip_prefix("cuda:")?.parse().ok()?;
        if device.unavailable.is_some() {
            return None;
        }
        let gpu = load::cuda(number);
        let figures = gpu.read_bandwidth().and_then(|read| Ok((read, gpu.int8_peak()?)));
        let said = |error| eprintln!("{}: {error}", device.name);
        figures.map_err(said).ok().map(|(read, int8)| Self { read, int8 })
    }
}
