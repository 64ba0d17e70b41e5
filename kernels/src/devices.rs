//! What this machine offers: its processor's instruction sets, and its memory bandwidth and
//! arithmetic, measured.
//!
//! Not here: choosing ([`crate::cpu`]). Decode speed is bounded by bytes per token over
//! [`read_bandwidth`], prefill speed by operations per token over [`int8_peak`].

use crate::Error;
use crate::cpu::isa::Machine;
use crate::cpu::pages::Arena;
use crate::cpu::peak::{Peak, Read};
use crate::cpu::simd::LANES;
use crate::cpu::{Isa, available_threads};
use crate::cuda::{self, DeviceInfo, Nvrtc, Places};
use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Something programs can run on, or why they cannot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// For example `cpu avx2`.
    pub name: String,
    /// Why it cannot be used; none if it can.
    pub unavailable: Option<String>,
    /// What it has, in words.
    pub features: String,
}

/// All devices this program knows, available or not, fastest first; `compiler` says where that of
/// CUDA devices may lie.
pub fn list(compiler: &Places) -> Vec<Device> {
    let missing = |name: &str, why: String| Device {
        name: name.to_owned(),
        unavailable: Some(why),
        features: String::new(),
    };
    let cuda = match cuda::devices() {
        Ok(found) => found.iter().map(|info| gpu(info, compiler)).collect(),
        Err(error) => vec![missing("cuda", reason(error))],
    };
    let wgpu = missing("wgpu", "not built yet".to_owned());
    cuda.into_iter().chain([wgpu]).chain(Isa::ALL.into_iter().rev().map(cpu)).collect()
}

fn gpu(info: &DeviceInfo, compiler: &Places) -> Device {
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    let nvrtc = Nvrtc::find(compiler, Some(info.driver.0));
    let (capability, driver) = (info.capability, info.driver);
    Device {
        name: format!("cuda:{}", info.index),
        features: format!(
            "{}, {}.{}, {} SMs, {:.1} of {:.1} GiB free, driver for CUDA {}.{}{}",
            info.name,
            capability.0,
            capability.1,
            info.multiprocessors,
            gib(info.free),
            gib(info.memory),
            driver.0,
            driver.1,
            nvrtc.as_ref().map_or(String::new(), |n| format!(", {}", n.describe())),
        ),
        unavailable: nvrtc.err().map(reason),
    }
}

/// An error without the device's name, which stands before it.
fn reason(error: Error) -> String {
    match error {
        Error::Device { reason, .. } => reason,
        error => error.to_string(),
    }
}

fn cpu(isa: Isa) -> Device {
    let missing = isa.missing();
    let lacks = || format!("this processor lacks {}", missing.join(", "));
    let what = match isa {
        Isa::Scalar => "any processor",
        Isa::Avx2 => "avx2, fma, f16c",
        Isa::Avx512 => "avx512 f, bw, vl, vnni",
        Isa::Amx => "avx512 f, bw, vl, vnni; amx tile, int8",
    };
    Device {
        name: format!("cpu {isa}"),
        unavailable: (!missing.is_empty()).then(lacks),
        features: format!("{what}; {} threads", available_threads()),
    }
}

/// Bytes of the buffer that is read: far beyond any cache.
const BUFFER: usize = 256 << 20;
/// Passes over it; the best counts, since other programs can only slow one down.
const READS: usize = 5;

/// Bytes per second that `threads` threads read from memory together with the widest loads this
/// processor has, out of the same kind of pages as weights, measured now in a fraction of a second:
/// the better of one stream a thread and four, of which sometimes one and sometimes the other wins.
pub fn read_bandwidth(threads: usize) -> f64 {
    let threads = threads.max(1);
    read_with::<1>(threads).max(read_with::<4>(threads))
}

/// 0 where the system has no memory left to read.
fn read_with<const STREAMS: usize>(threads: usize) -> f64 {
    let machine = Isa::best().detect().unwrap_or(Machine::Scalar);
    let (vectors, there) = (BUFFER / size_of::<[f32; LANES]>() / threads, AtomicUsize::new(0));
    let reader = || {
        let mut part = Arena::default().zeroed(vectors).ok();
        if let Some(part) = &mut part {
            // Not zero: untouched zero pages would all be one page.
            part.fill([1.0f32; LANES]);
            there.fetch_add(size_of_val(&part[..]), Ordering::Relaxed);
        }
        move || {
            black_box(machine.run(Read::<STREAMS>(part.as_deref().unwrap_or_default())));
        }
    };
    let seconds = least_time(threads, READS, reader);
    there.into_inner() as f64 / seconds
}

/// Rounds of the arithmetic loop in a pass: less than a millisecond, which other programs often
/// leave undisturbed.
const ROUNDS: usize = 20_000;
/// Passes of it.
const PASSES: usize = 50;

/// Operations per second (a multiplication and an addition are two) that `threads` threads do
/// together on int8 activations and 4-bit codes with the dots of `isa`, or on int8 tiles with its matrix
/// unit, measured now in a fraction of a second.
///
/// # Errors
/// [`Error::Device`] naming the features the processor lacks.
pub fn int8_peak(isa: Isa, threads: usize) -> Result<f64, Error> {
    if let Some(peak) = matrix_peak(isa, threads)? {
        return Ok(peak);
    }
    // Six sums fill sixteen registers where a line takes two, eight hide the latency where it
    // takes one.
    Ok(peak_with::<6>(isa, threads)?.max(peak_with::<8>(isa, threads)?))
}

/// Of the matrix unit, if it has one.
fn matrix_peak(isa: Isa, threads: usize) -> Result<Option<f64>, Error> {
    let (machine, threads) = (isa.detect()?, threads.max(1));
    let Some(ops) = machine.matrix_products(ROUNDS) else { return Ok(None) };
    let worker = || {
        move || {
            black_box(machine.matrix_products(ROUNDS));
        }
    };
    Ok(Some((ops * threads) as f64 / least_time(threads, PASSES, worker)))
}

fn peak_with<const M: usize>(isa: Isa, threads: usize) -> Result<f64, Error> {
    let (machine, threads) = (isa.detect()?, threads.max(1));
    let rounds = if isa == Isa::Scalar { ROUNDS / 20 } else { ROUNDS };
    let peak = Peak::<M> { rounds };
    let worker = || {
        move || {
            black_box(machine.run(peak));
        }
    };
    Ok((peak.ops() * threads) as f64 / least_time(threads, PASSES, worker))
}

/// Least seconds from the first start to the last end over some passes of work that `threads`
/// threads do together; each thread prepares its own by `prepare`.
fn least_time<W: FnMut()>(threads: usize, passes: usize, prepare: impl Fn() -> W + Sync) -> f64 {
    let start = Barrier::new(threads);
    let times = std::thread::scope(|scope| {
        let member = || {
            let mut work = prepare();
            let mut one = || {
                start.wait();
                let begin = Instant::now();
                work();
                (begin, Instant::now())
            };
            (0..passes).map(|_| one()).collect::<Vec<_>>()
        };
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(member)).collect();
        handles.into_iter().filter_map(|handle| handle.join().ok()).collect::<Vec<_>>()
    });
    let pass = |i: usize| {
        let begin = times.iter().map(|passes| passes[i].0).min();
        let end = times.iter().map(|passes| passes[i].1).max();
        begin.zip(end).map_or(f64::INFINITY, |(begin, end)| (end - begin).as_secs_f64())
    };
    (0..passes).map(pass).fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_is_plausible() {
        let found = read_bandwidth(1);
        // slower than any disk or faster than any memory would be a mistake
        assert!((1e8..1e13).contains(&found), "{found}");
    }

    #[test]
    fn the_int8_peak_is_plausible() {
        for isa in Isa::ALL {
            match int8_peak(isa, 1) {
                // less than one operation a microsecond or more than any core would be a mistake
                Ok(found) => {
                    println!("{isa}: {:.0} GOPS", found / 1e9);
                    assert!((1e6..1e14).contains(&found), "{isa}: {found}");
                }
                Err(refused) => assert!(refused.to_string().contains("lacks"), "{refused}"),
            }
        }
    }

    #[test]
    fn the_scalar_cpu_is_always_there() {
        let all = list(&Places::default());
        // One line for each GPU, or the reason why there is none; wgpu; the processor's.
        assert!(all.len() >= 2 + Isa::ALL.len(), "{all:?}");
        assert!(all.iter().all(|d| d.unavailable.as_ref().is_none_or(|why| !why.contains('\n'))));
        let scalar = all.iter().find(|d| d.name == "cpu scalar").unwrap();
        assert_eq!(scalar.unavailable, None);
    }
}
