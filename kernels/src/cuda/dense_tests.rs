//! Every kernel for weights of two bytes gives the same bits, and what is exact comes out exactly.
//!
//! Kernels are launched by themselves, also for rows and shapes that the plan has others for. Not here:
//! how far off results may be (`crate::conformance`).

use super::emulated::Emulated;
use super::gpu::{Arg, Gpu, Launch, Pointer};
use emulator::Options;
use quant::FloatType;
use testkit::Rng;

/// Bytes of shared memory of `gemm_dense.cu`, and of a tile's sums of ranges.
const SHARED: u32 = 48 << 10;
const RANGE_SUMS: usize = 8 * 128 * 64 * 4;

/// A kernel and how it is launched.
#[derive(Debug, Clone, Copy)]
enum Kernel {
    /// Tiles of sixteen rows of weights and groups of eight rows of activations of a block.
    Few([usize; 2]),
    /// Blocks that share a tile.
    Many(usize),
}

/// All of them.
const KERNELS: [Kernel; 10] = [
    Kernel::Few([1, 1]),
    Kernel::Few([1, 2]),
    Kernel::Few([2, 1]),
    Kernel::Few([2, 2]),
    Kernel::Few([4, 1]),
    Kernel::Few([4, 2]),
    Kernel::Many(1),
    Kernel::Many(2),
    Kernel::Many(4),
    Kernel::Many(8),
];

/// The name of a kernel for a type, which is its own as long as the program runs.
fn name(kernel: Kernel, float: FloatType) -> &'static str {
    let names = match kernel {
        Kernel::Few([1, 1]) => ["linear_f16_t1_m8", "linear_bf16_t1_m8"],
        Kernel::Few([1, _]) => ["linear_f16_t1_m16", "linear_bf16_t1_m16"],
        Kernel::Few([2, 1]) => ["linear_f16_t2_m8", "linear_bf16_t2_m8"],
        Kernel::Few([2, _]) => ["linear_f16_t2_m16", "linear_bf16_t2_m16"],
        Kernel::Few([_, 1]) => ["linear_f16_t4_m8", "linear_bf16_t4_m8"],
        Kernel::Few(_) => ["linear_f16_t4_m16", "linear_bf16_t4_m16"],
        Kernel::Many(1) => ["gemm_f16", "gemm_bf16"],
        Kernel::Many(_) => ["gemm_f16_parts", "gemm_bf16_parts"],
    };
    names[usize::from(float == FloatType::Bf16)]
}

/// A linear on an emulated device.
struct Linear {
    gpu: Emulated,
    float: FloatType,
    n: usize,
    k: usize,
    most: usize,
    counts: Pointer,
    weight: Pointer,
    parts: Pointer,
    scales: Pointer,
    x: Pointer,
    range_sums: Pointer,
    counters: Pointer,
}

impl Linear {
    /// Weights `[n, k]` and activations of so many rows; none where nothing can be emulated.
    fn new(float: FloatType, [n, k]: [usize; 2], weights: &[f32], x: &[f32]) -> Option<Self> {
        if let Err(why) = emulator::available() {
            println!("skipped: {why}");
            return None;
        }
        let mut gpu = Emulated::new(Options { poison: true, ..Options::default() }).unwrap();
        let bits = |w: &f32| match float {
            FloatType::Bf16 => half::bf16::from_f32(*w).to_bits(),
            _ => half::f16::from_f32(*w).to_bits(),
        };
        let weights: Vec<u16> = weights.iter().map(bits).collect();
        let mut put = |bytes: &[u8]| {
            let at = gpu.alloc(bytes.len()).unwrap();
            gpu.write(at, bytes).unwrap();
            at
        };
        let (most, tiles) = (x.len() / k, n.div_ceil(128) * (x.len() / k).div_ceil(64));
        let counts = put(&[0; 4]);
        let (weight, x) = (put(bytemuck::cast_slice(&weights)), put(bytemuck::cast_slice(x)));
        let parts = put(&vec![255; most * k.div_ceil(32) * 128]);
        let (scales, counters) = (put(&vec![255; most * 4]), put(&vec![0; tiles * 4]));
        let range_sums = put(&vec![255; tiles * RANGE_SUMS]);
        Some(Self {
            gpu,
            float,
            n,
            k,
            most,
            counts,
            weight,
            parts,
            scales,
            x,
            range_sums,
            counters,
        })
    }

    fn launch(&mut self, kernel: &'static str, grid: [usize; 3], threads: u32, args: Vec<Arg>) {
        let grid = grid.map(|blocks| blocks as u32);
        let shared = if threads == 128 { SHARED } else { 0 };
        self.gpu.launch(&Launch { kernel, grid, threads, shared, args }).unwrap();
    }

    /// Outputs `[rows, n]` of the first rows; the launch is made for all of them.
    fn run(&mut self, kernel: Kernel, rows: usize) -> Vec<f32> {
        let pointer = Arg::Pointer;
        self.gpu.write(self.counts, &(rows as u32).to_le_bytes()).unwrap();
        let split = ["split_f16", "split_bf16"][usize::from(self.float == FloatType::Bf16)];
        let (counts, k) = (pointer(self.counts), Arg::Int(self.k as i32));
        let args = vec![counts, pointer(self.x), k, pointer(self.parts), pointer(self.scales)];
        self.launch(split, [1, self.most, 1], 256, args);
        let out = self.gpu.alloc(rows * self.n * 4).unwrap();
        let n = Arg::Int(self.n as i32);
        let mut args = vec![counts, pointer(self.weight), pointer(Pointer::NULL)];
        args.extend([pointer(self.parts), pointer(self.scales), pointer(out)]);
        args.extend([n, k, n, Arg::Int(0)]);
        let name = name(kernel, self.float);
        match kernel {
            Kernel::Few([tiles, groups]) => {
                let grid = [self.n.div_ceil(16 * tiles), self.most.div_ceil(8 * groups), 1];
                self.launch(name, grid, 256, args);
            }
            Kernel::Many(shares) => {
                if shares > 1 {
                    args.extend([pointer(self.range_sums), pointer(self.counters)]);
                }
                let grid = [self.most.div_ceil(64), self.n.div_ceil(128), shares];
                self.launch(name, grid, 128, args);
            }
        }
        let mut values = vec![0.0f32; rows * self.n];
        self.gpu.read(out, bytemuck::cast_slice_mut(&mut values)).unwrap();
        values
    }
}

const FLOATS: [FloatType; 2] = [FloatType::F16, FloatType::Bf16];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn all_kernels_and_all_numbers_of_rows_give_the_same_bits() {
    let mut rng = Rng::new(31);
    for float in FLOATS {
        // Fewer blocks of columns than ranges, odd ones, and several for each stage of the ring.
        for (shape, most) in [([17, 33], 70), ([130, 40], 20), ([5, 1030], 9), ([150, 840], 66)] {
            let [n, k] = shape;
            let (weights, x) = (rng.floats(n * k, 1.0), rng.floats(most * k, 3.0));
            let Some(mut linear) = Linear::new(float, shape, &weights, &x) else { return };
            let right = bits(&linear.run(KERNELS[0], most));
            for kernel in KERNELS {
                for rows in [most, 1] {
                    let found = bits(&linear.run(kernel, rows));
                    assert!(found == right[..rows * n], "{float} {shape:?} {rows}: {kernel:?}");
                }
            }
        }
    }
}

#[test]
fn every_count_of_rows_up_to_six_hundred_gives_the_same_bits() {
    let (mut rng, [n, k], most) = (Rng::new(32), [3, 24], 600);
    let (weights, x) = (rng.floats(n * k, 1.0), rng.floats(most * k, 1.0));
    for float in FLOATS {
        let Some(mut linear) = Linear::new(float, [n, k], &weights, &x) else { return };
        let right = bits(&linear.run(Kernel::Many(1), most));
        for rows in [2, 7, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 257, 511, 599] {
            let found = bits(&linear.run(Kernel::Many(8), rows));
            assert!(found == right[..rows * n], "{float}: {rows} rows");
        }
    }
}

/// Whole numbers of as many digits as two parts have, and sums below 2^24: nothing is rounded.
#[test]
fn exact_sums_are_exact() {
    let (mut rng, [n, k], rows) = (Rng::new(33), [20, 40], 18);
    for (float, most) in [(FloatType::F16, 1 << 18), (FloatType::Bf16, 1 << 15)] {
        let mut whole = |count: usize, most: usize| -> Vec<f32> {
            (0..count).map(|_| rng.below(2 * most) as f32 - most as f32).collect()
        };
        let (weights, x) = (whole(n * k, 2), whole(rows * k, most));
        let Some(mut linear) = Linear::new(float, [n, k], &weights, &x) else { return };
        let product =
            |(x, w): (&[f32], &[f32])| -> f32 { x.iter().zip(w).map(|(x, w)| x * w).sum() };
        let rows_of = |x| weights.chunks(k).map(move |w| product((x, w)));
        let right: Vec<f32> = x.chunks(k).flat_map(rows_of).collect();
        for kernel in KERNELS {
            assert_eq!(linear.run(kernel, rows), right, "{float} {kernel:?}");
        }
    }
}

#[test]
fn a_row_that_is_not_finite_shows_it_in_all_its_outputs_and_in_no_other() {
    let (mut rng, [n, k], rows) = (Rng::new(34), [20, 40], 12);
    let (weights, clean) = (rng.floats(n * k, 1.0), rng.floats(rows * k, 1.0));
    let mut x = clean.clone();
    for (row, value) in [(1, f32::INFINITY), (4, f32::NAN), (9, f32::NEG_INFINITY)] {
        x[row * k + 5 * row % k] = value;
    }
    // Zeros stay zeros; the largest and the smallest numbers are no infinities.
    x[6 * k..7 * k].fill(0.0);
    x[7 * k..8 * k].iter_mut().for_each(|x| *x *= 1e-42);
    x[8 * k..9 * k].iter_mut().for_each(|x| *x *= 1e36);
    for float in FLOATS {
        let Some(mut linear) = Linear::new(float, [n, k], &weights, &x) else { return };
        let Some(mut other) = Linear::new(float, [n, k], &weights, &clean) else { return };
        for kernel in [Kernel::Few([1, 2]), Kernel::Many(1)] {
            let (found, right) = (linear.run(kernel, rows), other.run(kernel, rows));
            let rows = found.chunks(n).zip(right.chunks(n)).enumerate();
            for (row, (found, right)) in rows {
                match row {
                    1 | 4 | 9 => assert!(found.iter().all(|y| !y.is_finite()), "{float} {row}"),
                    6 => assert!(found.iter().all(|y| *y == 0.0), "{float}"),
                    7 => assert!(found.iter().all(|y| y.abs() < 1e-40), "{float}"),
                    8 => {
                        let near = |(y, z): (&f32, &f32)| (y / 1e36 - z).abs() < 1e-3;
                        assert!(found.iter().zip(right).all(near), "{float}");
                    }
                    _ => assert_eq!(bits(found), bits(right), "{float} {row}"),
                }
            }
        }
    }
}
