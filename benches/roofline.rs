//! How near linears come to the memory's read bandwidth, and what more rows cost.
//!
//! Prints one line a shape: GB/s of one row, its share of the bandwidth measured in the same
//! minute, and T(m) / T(1). Repetitions of all row counts take turns and the least time counts,
//! since other programs on the machine can only add to it. Arguments: words that a line's name
//! must hold, and a number of rounds (`cargo bench -p benches --bench roofline -- w4g128 50`).

#![allow(clippy::print_stdout)]

use benches::decoder::{self, Decoder};
use benches::linear::{Linears, Setup, w4g128};
use kernels::devices::read_bandwidth;
use quant::{Bits, FloatType, Format};
use std::time::Instant;

const ROWS: [usize; 6] = [1, 2, 4, 8, 16, 64];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let rounds = args.iter().find_map(|a| a.parse().ok()).unwrap_or(12);
    let words: Vec<&String> = args.iter().filter(|a| a.parse::<usize>().is_err()).collect();
    let w8 = Format::Grouped { bits: Bits::Eight, group: 128, act_order: false };
    let w4g32 = Format::Grouped { bits: Bits::Four, group: 32, act_order: false };
    let shapes = [[4096, 4096], [14336, 4096], [4096, 14336], [1024, 1024]];
    for threads in [1, 2] {
        for format in [w4g128(), w4g32, w8, Format::Dense(FloatType::F16)] {
            for shape in shapes {
                let [n, k] = shape;
                let name = format!("{format} {n}x{k} {threads} threads");
                if words.iter().all(|word| name.contains(*word)) {
                    let setup = Setup { format, shape, isa: None, threads: Some(threads) };
                    report(&name, setup, rounds);
                }
            }
        }
        let name = format!("decoder {threads} threads");
        if words.iter().all(|word| name.contains(*word)) {
            whole_steps(&name, threads, rounds);
        }
    }
}

/// Least seconds of some rounds of `work`.
fn least(rounds: usize, mut work: impl FnMut()) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..rounds {
        let start = Instant::now();
        work();
        least = least.min(start.elapsed().as_secs_f64());
    }
    least
}

/// Times prefill and decode of a whole decoder.
fn whole_steps(name: &str, threads: usize, rounds: usize) {
    let Some(mut decoder) = Decoder::new(threads) else { return };
    let bandwidth = read_bandwidth(threads);
    let bytes = decoder.program.bytes_per_token() as f64;
    println!("{name}: {:.0} MB a token at {:.1} GB/s", bytes / 1e6, bandwidth / 1e9);
    for start in (0..decoder::CONTEXT - decoder::ROWS).step_by(decoder::ROWS) {
        decoder.step(start, decoder::ROWS, false);
    }
    for start in [0, 1024] {
        let time = least(rounds.div_ceil(4), || decoder.step(start, decoder::ROWS, false));
        let rate = decoder::ROWS as f64 / time;
        println!("  prefill of {} at {start}: {rate:.0} tokens/s", decoder::ROWS);
    }
    for start in [16, 512, 1900] {
        let one = least(rounds, || decoder.step(start, 1, true));
        let share = bytes / one / bandwidth;
        let more = [2, 4, 8].map(|m| {
            let time = least(rounds, || decoder.step(start, m, true));
            format!("T({m}) {:.2}", time / one)
        });
        println!(
            "  decode at {start}: {:.1} tokens/s, {:.0} % of bandwidth  {}",
            1.0 / one,
            100.0 * share,
            more.join(" ")
        );
    }
}

fn report(name: &str, setup: Setup, rounds: usize) {
    let Some(mut linears) = Linears::new(setup) else { return };
    let mut least = [f64::INFINITY; ROWS.len()];
    let mut bandwidth: f64 = 0.0;
    for round in 0..rounds {
        for (least, m) in least.iter_mut().zip(ROWS) {
            let start = Instant::now();
            linears.step(m);
            *least = least.min(start.elapsed().as_secs_f64() / linears.copies() as f64);
        }
        if round % 5 == 0 {
            bandwidth = bandwidth.max(read_bandwidth(setup.threads.unwrap_or(1)));
        }
    }
    let rate = linears.bytes(1) as f64 / least[0];
    let ratios: Vec<String> = ROWS[1..]
        .iter()
        .zip(&least[1..])
        .map(|(m, t)| format!("T({m}) {:.2}", t / least[0]))
        .collect();
    let [n, k] = setup.shape;
    let ops = 2.0 * (n * k * ROWS[ROWS.len() - 1]) as f64 / least[ROWS.len() - 1];
    println!(
        "{name}: {:.1} GB/s of {:.1} ({:.0} %)  {}  m 64: {:.0} GOPS",
        rate / 1e9,
        bandwidth / 1e9,
        100.0 * rate / bandwidth,
        ratios.join(" "),
        ops / 1e9,
    );
}
