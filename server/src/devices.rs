//! `foretoken devices`: what this machine offers and what is not there, with the reason.

use crate::cli::DevicesArgs;
use crate::{Io, environment};
use serde_json::json;

/// Runs the command.
pub(crate) fn run(args: &DevicesArgs, io: &mut Io<'_>) -> anyhow::Result<()> {
    let devices = kernels::devices::list(&environment::cuda_compiler());
    let threads = kernels::cpu::available_threads();
    let bandwidth = kernels::devices::read_bandwidth(threads);
    if args.json {
        let rows: Vec<_> = devices
            .iter()
            .map(|d| {
                json!({
                    "name": d.name,
                    "available": d.unavailable.is_none(),
                    "unavailable": d.unavailable,
                    "features": d.features,
                })
            })
            .collect();
        let object =
            json!({"devices": rows, "threads": threads, "read_bytes_per_second": bandwidth});
        writeln!(io.out, "{object}")?;
        return Ok(());
    }
    for device in devices {
        let state =
            device.unavailable.map_or("available".to_owned(), |why| format!("unavailable: {why}"));
        writeln!(io.out, "{:<12} {:<36} {state}", device.name, device.features)?;
    }
    writeln!(io.out, "read bandwidth {:.1} GB/s with {threads} threads, now", bandwidth / 1e9)?;
    Ok(())
}
