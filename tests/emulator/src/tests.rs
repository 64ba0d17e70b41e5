//! The emulator finds what it must find, and kernels give right answers on it.
//!
//! Kernels are those of `selftest.cu`, and some of `shaders/cuda`, which `kernels` tests in full.

use super::*;

/// A generator of reproducible numbers: SplitMix64 (Steele, Lea, Flood 2014).
struct Rng(u64);

impl Rng {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `n` values in -1 .. 1.
    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.bits() as u8).collect()
    }
}

/// Runs `test` with every order and timing, or says why not.
fn each(test: impl Fn(&mut Emulator)) {
    if let Err(reason) = available() {
        println!("skipped: {reason}");
        return;
    }
    for options in Options::all() {
        println!("{options:?}");
        test(&mut Emulator::new(options).unwrap());
    }
}

/// Values that lie in memory as four bytes, or two.
trait Plain: Copy {
    fn put(self, to: &mut Vec<u8>);
    fn take(from: &[u8]) -> Self;
    const BYTES: usize;
}

macro_rules! plain {
    ($($kind:ty),*) => {$(
        impl Plain for $kind {
            fn put(self, to: &mut Vec<u8>) {
                to.extend(self.to_le_bytes());
            }
            fn take(from: &[u8]) -> Self {
                Self::from_le_bytes(from.try_into().unwrap())
            }
            const BYTES: usize = size_of::<Self>();
        }
    )*};
}
plain!(u8, u16, u32, i32, f32);

fn put<T: Plain>(device: &mut Emulator, values: &[T]) -> u64 {
    let mut bytes = vec![];
    values.iter().for_each(|v| v.put(&mut bytes));
    let at = device.alloc(bytes.len()).unwrap();
    device.write(at, &bytes).unwrap();
    at
}

fn get<T: Plain>(device: &Emulator, from: u64, n: usize) -> Vec<T> {
    let mut bytes = vec![0; n * T::BYTES];
    device.read(from, &mut bytes).unwrap();
    bytes.chunks_exact(T::BYTES).map(T::take).collect()
}

use Arg::{Float, Int, Pointer};

#[test]
fn shuffles_reach_the_whole_warp() {
    each(|device| {
        let (out, floats) = (device.alloc(256).unwrap(), device.alloc(256).unwrap());
        let args = [Pointer(out), Pointer(floats)];
        device.launch("selftest_shuffle", [1, 1, 1], 64, 0, &args).unwrap();
        assert_eq!(get::<i32>(device, out, 64), [496; 64]);
        assert_eq!(get::<f32>(device, floats, 64), [2.0; 64]);
    });
}

/// What `selftest_mirror` gives on 3 blocks in 4 rounds.
fn mirror(device: &mut Emulator, barriers: i32) -> Vec<i32> {
    let out = device.alloc(3 * 256 * 4).unwrap();
    let args = [Pointer(out), Int(4), Int(barriers)];
    device.launch("selftest_mirror", [3, 1, 1], 256, 0, &args).unwrap();
    get(device, out, 3 * 256)
}

#[test]
fn a_missing_barrier_is_seen() {
    let right: Vec<i32> = (0..3 * 256).map(|i| (255 - i % 256) * (1 + 2 + 3 + 4)).collect();
    let wrong = std::cell::RefCell::new([0; 4]);
    each(|device| {
        assert_eq!(mirror(device, 3), right);
        for barriers in 0..3 {
            let is_wrong = mirror(device, barriers) != right;
            wrong.borrow_mut()[barriers as usize] += i32::from(is_wrong);
        }
    });
    if available().is_ok() {
        println!("wrong of 8 runs, by barriers left: {wrong:?}");
        // Warps by turns hide a missing barrier where all of them wait for their lanes.
        let [none, only_before_reading, only_before_writing, _] = wrong.into_inner();
        assert_eq!(none, 8);
        assert!(only_before_reading >= 4 && only_before_writing >= 4);
    }
}

#[test]
fn a_missing_wait_is_seen() {
    let from: Vec<u32> = (0..256 * 4).collect();
    // Each half is turned round.
    let source = |i: u32| if i < 128 { 127 - i } else { 383 - i };
    let right: Vec<u32> = (0..256).map(|i| 4 * source(i)).collect();
    each(|device| {
        let (at, to) = (put(device, &from), device.alloc(4096).unwrap());
        for waits in [1, 0] {
            let args = [Pointer(at), Pointer(to), Int(waits)];
            device.launch("selftest_copy", [1, 1, 1], 128, 4096, &args).unwrap();
            let first: Vec<u32> = get(device, to, 1024).into_iter().step_by(4).collect();
            let late = device.options.async_copies == AsyncCopies::Late;
            assert_eq!(first == right, waits == 1 || !late, "waits {waits}");
        }
    });
}

#[test]
fn integer_tiles_are_scalar_products() {
    let mut rng = Rng(1);
    let (a, b) = (rng.bytes(16 * 32), rng.bytes(8 * 32));
    let product = |i: usize| {
        let (row, column) = (&a[i / 8 * 32..][..32], &b[i % 8 * 32..][..32]);
        row.iter().zip(column).map(|(&a, &b)| i32::from(a) * i32::from(b.cast_signed())).sum()
    };
    let right: Vec<i32> = (0..128).map(product).collect();
    each(|device| {
        let (a, b, c) = (put(device, &a), put(device, &b), device.alloc(512).unwrap());
        let args = [Pointer(a), Pointer(b), Pointer(c)];
        device.launch("selftest_mma_u8i8", [1, 1, 1], 32, 0, &args).unwrap();
        assert_eq!(get::<i32>(device, c, 128), right);
    });
}

#[test]
fn half_tiles_are_scalar_products() {
    // Small integers: halves k * 0.25, whose products' sums are exact in f32.
    let mut rng = Rng(2);
    let halves: [u16; 8] = [0x0000, 0x3400, 0x3800, 0x3a00, 0x3c00, 0xb400, 0xb800, 0xbc00];
    let values = [0.0f32, 0.25, 0.5, 0.75, 1.0, -0.25, -0.5, -1.0];
    let mut draw = |n: usize| -> Vec<usize> { (0..n).map(|_| (rng.bits() % 8) as usize).collect() };
    let (a, b) = (draw(16 * 16), draw(8 * 16));
    let product = |i: usize| {
        let (row, column) = (&a[i / 8 * 16..][..16], &b[i % 8 * 16..][..16]);
        row.iter().zip(column).map(|(&a, &b)| values[a] * values[b]).sum()
    };
    let right: Vec<f32> = (0..128).map(product).collect();
    let bits = |m: &[usize]| m.iter().map(|&i| halves[i]).collect::<Vec<u16>>();
    each(|device| {
        let (a, b) = (put(device, &bits(&a)), put(device, &bits(&b)));
        let c = device.alloc(512).unwrap();
        let args = [Pointer(a), Pointer(b), Pointer(c)];
        device.launch("selftest_mma_f16", [1, 1, 1], 32, 512, &args).unwrap();
        assert_eq!(get::<f32>(device, c, 128), right);
    });
}

#[test]
fn bf16_tiles_are_scalar_products() {
    let mut rng = Rng(3);
    // The high halves of f32: small integers and their quarters.
    let values = [0.0f32, 0.25, 0.5, 3.0, 1.0, -0.25, -2.0, -1.0];
    let mut draw = |n: usize| -> Vec<usize> { (0..n).map(|_| (rng.bits() % 8) as usize).collect() };
    let (a, b) = (draw(16 * 16), draw(16 * 8));
    let product =
        |i: usize| (0..16).map(|k| values[a[i / 8 * 16 + k]] * values[b[k * 8 + i % 8]]).sum();
    let right: Vec<f32> = (0..128).map(product).collect();
    let bits = |m: &[usize]| m.iter().map(|&i| (values[i].to_bits() >> 16) as u16).collect();
    let (a, b): (Vec<u16>, Vec<u16>) = (bits(&a), bits(&b));
    each(|device| {
        let (a, b, c) = (put(device, &a), put(device, &b), device.alloc(512).unwrap());
        let args = [Pointer(a), Pointer(b), Pointer(c)];
        device.launch("selftest_mma_bf16", [1, 1, 1], 32, 256, &args).unwrap();
        assert_eq!(get::<f32>(device, c, 128), right);
    });
}

#[test]
fn the_last_block_is_found_and_the_counter_is_as_before() {
    each(|device| {
        let [counter, sum, out] = [0; 3].map(|zero: i32| put(device, &[zero]));
        let args = [Pointer(counter), Pointer(sum), Pointer(out)];
        for round in 1..=2 {
            device.launch("selftest_last", [9, 1, 1], 64, 0, &args).unwrap();
            assert_eq!(get::<i32>(device, out, 1), [45 * round]);
            assert_eq!(get::<i32>(device, counter, 1), [0]);
        }
    });
}

#[test]
fn a_thread_that_does_not_wait_for_the_launches_before_is_found() {
    each(|device| {
        let unused = device.alloc(4).unwrap();
        let args = [Pointer(unused)];
        let error = device.launch("selftest_hasty", [1, 1, 1], 32, 0, &args).unwrap_err();
        assert!(error.contains("thread 5: waits 0 times for the launches before"), "{error}");
        device.launch("selftest_empty", [1, 1, 1], 32, 0, &args).unwrap();
    });
}

/// The value of half `bits`, by its definition.
fn half(bits: u16) -> f64 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    sign * match exponent {
        0 => mantissa * 2f64.powi(-24),
        31 if mantissa == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + mantissa) * 2f64.powi(exponent - 25),
    }
}

#[test]
fn halves_go_to_f32_and_back() {
    each(|device| {
        let (wide, narrow) = (device.alloc(4 * 65536).unwrap(), device.alloc(2 * 65536).unwrap());
        let args = [Pointer(wide), Pointer(narrow)];
        device.launch("selftest_halves", [256, 1, 1], 256, 0, &args).unwrap();
        let (wide, narrow) = (get::<f32>(device, wide, 65536), get::<u16>(device, narrow, 65536));
        for bits in 0..=u16::MAX {
            let (value, got) = (half(bits), wide[bits as usize]);
            if value.is_nan() {
                assert!(got.is_nan() && narrow[bits as usize] == 0x7fff, "{bits:#x}");
            } else {
                assert_eq!(got.to_bits(), (value as f32).to_bits(), "{bits:#x}");
                assert_eq!(narrow[bits as usize], bits);
            }
        }
    });
}

/// The half nearest to `value`, the even one of two: by bisection over all of them.
fn nearest_half(value: f32) -> u16 {
    let magnitude = f64::from(value.abs());
    // Infinity stands where the next half would be.
    let of = |bits: u16| if bits == 0x7c00 { 65536.0 } else { half(bits) };
    let above = (0..0x7c00u16).collect::<Vec<_>>().partition_point(|&bits| of(bits) < magnitude);
    let (high, low) = (above.min(0x7c00) as u16, above.saturating_sub(1) as u16);
    let (up, down) = (of(high) - magnitude, magnitude - of(low));
    let take_low = down < up || (down == up && low % 2 == 0);
    let bits = if take_low { low } else { high };
    bits | if value.is_sign_negative() { 0x8000 } else { 0 }
}

#[test]
fn floats_go_to_the_nearest_half() {
    let mut rng = Rng(3);
    let mut values =
        vec![0.0, -0.0, 65504.0, 65519.99, 65520.0, 1e9, f32::INFINITY, -f32::INFINITY];
    values.extend([2f32.powi(-24), 2f32.powi(-25), 3.0 * 2f32.powi(-25), 2f32.powi(-14), 1e-30]);
    // Halfway between two halves, normal and subnormal, and what lies beside.
    for bits in [0x0001u16, 0x0002, 0x03ff, 0x0400, 0x3c00, 0x3c01, 0x7bfe] {
        let middle = ((half(bits) + half(bits + 1)) / 2.0) as f32;
        values.extend([middle, middle.next_up(), middle.next_down(), -middle]);
    }
    while values.len() < 512 {
        let exponent = (values.len() % 44) as i32 - 26;
        values.push(rng.floats(1)[0] * 2f32.powi(exponent));
    }
    each(|device| {
        let (from, to) = (put(device, &values), device.alloc(1024).unwrap());
        let args = [Pointer(from), Pointer(to)];
        device.launch("selftest_narrow", [2, 1, 1], 256, 0, &args).unwrap();
        for (value, got) in values.iter().zip(get::<u16>(device, to, 512)) {
            assert_eq!(got, nearest_half(*value), "{value:e}");
        }
    });
}

#[test]
fn accesses_beyond_memory_are_errors() {
    each(|device| {
        // 40 bytes end in a row of 256, the next page is far; 4096 bytes end with their page.
        let (small, page) = (device.alloc(40).unwrap(), device.alloc(4096).unwrap());
        let mut touch = |to: u64, write: i32, read: i32| {
            let args = [Pointer(to), Pointer(page), Int(write), Int(read)];
            device.launch("selftest_touch", [1, 1, 1], 32, 0, &args)
        };
        touch(small, 9, 1023).unwrap();
        touch(page, 1023, 0).unwrap();
        let error = touch(page, 1024, 0).unwrap_err();
        assert!(error.contains("selftest_touch, block (0, 0, 0), thread 7: touches"), "{error}");
        assert!(error.contains("0 bytes behind the 4096 bytes of argument 0"), "{error}");
        let error = touch(small, 0, 1026).unwrap_err();
        assert!(error.contains("8 bytes behind the 4096 bytes of argument 1"), "{error}");
        let error = touch(small, 10, 0).unwrap_err();
        assert!(error.contains("behind the 40 bytes of argument 0"), "{error}");
        touch(0, 0, 0).unwrap_err();
    });
}

#[test]
fn writes_before_memory_are_errors() {
    each(|device| {
        let (small, page) = (device.alloc(40).unwrap(), device.alloc(4096).unwrap());
        let args = [Pointer(small), Pointer(page), Int(-1), Int(0)];
        let error = device.launch("selftest_touch", [1, 1, 1], 32, 0, &args).unwrap_err();
        assert!(error.contains("before or behind the 40 bytes of argument 0"), "{error}");
    });
}

#[test]
fn writes_behind_shared_memory_are_errors() {
    each(|device| {
        device.launch("selftest_shared_overrun", [2, 1, 1], 32, 132, &[Int(32)]).unwrap();
        let error = device.launch("selftest_shared_overrun", [2, 1, 1], 32, 128, &[Int(32)]);
        assert!(error.unwrap_err().contains("past the 128 bytes of dynamic shared memory"));
    });
}

#[test]
fn shared_memory_holds_poison_in_every_block() {
    each(|device| {
        let out = device.alloc(256).unwrap();
        device.launch("selftest_poison", [3, 1, 1], 32, 128, &[Pointer(out)]).unwrap();
        assert_eq!(get::<u32>(device, out, 64), [u32::MAX; 64]);
    });
}

#[test]
fn threads_that_part_are_errors() {
    each(|device| {
        let out = device.alloc(256).unwrap();
        let mut diverge =
            |how| device.launch("selftest_diverge", [1, 1, 1], 64, 0, &[Pointer(out), Int(how)]);
        diverge(4).unwrap();
        for (how, words) in [
            (0, "while others wait at that of selftest.cu:"),
            (1, "has ended"),
            (2, "while thread 40 has ended"),
            (3, "calls shuffle_xor at selftest.cu:"),
        ] {
            let error = diverge(how).unwrap_err();
            assert!(error.contains("kernel selftest_diverge, block (0, 0, 0), thread"), "{error}");
            assert!(error.contains(words), "{how}: {error}");
        }
        // An error leaves nothing behind.
        diverge(4).unwrap();
    });
}

#[test]
fn launches_that_do_not_fit_are_errors() {
    each(|device| {
        let at = device.alloc(64).unwrap();
        let mut launch = |name, threads, shared, args: &[Arg]| {
            device.launch(name, [1, 1, 1], threads, shared, args).unwrap_err()
        };
        assert_eq!(launch("nothing", 32, 0, &[]), "no kernel nothing");
        let error = launch("selftest_order", 64, 0, &[Pointer(at)]);
        assert!(error.contains("takes 2 arguments (pp: "), "{error}");
        let error = launch("selftest_order", 64, 0, &[Pointer(at), Int(0)]);
        assert!(error.contains("got 2 (pi)"), "{error}");
        let error = launch("selftest_empty", 257, 0, &[Pointer(at)]);
        assert!(error.contains("takes 1 to 256 threads"), "{error}");
        let error = launch("selftest_empty", 256, 1 << 20, &[Pointer(at)]);
        assert!(error.contains("at most 232448"), "{error}");
        let error = launch("selftest_empty", 256, 0, &[Pointer(4096)]);
        assert!(error.contains("argument 0: address 0x1000 lies in no memory"), "{error}");
        assert!(device.write(at + 60, &[0; 5]).is_err() && device.write(at, &[0; 64]).is_ok());
        assert!(device.read(at + 64, &mut [0; 1]).is_err() && device.read(1, &mut []).is_err());
    });
}

/// The order in which 2 blocks of 64 threads came.
fn tickets(order: Order) -> Vec<i32> {
    let mut device = Emulator::new(Options { order, ..Options::default() }).unwrap();
    let (counter, out) = (device.alloc(4).unwrap(), device.alloc(512).unwrap());
    let args = [Pointer(counter), Pointer(out)];
    device.launch("selftest_order", [2, 1, 1], 64, 0, &args).unwrap();
    get(&device, out, 128)
}

#[test]
fn orders_are_what_they_say() {
    if let Err(reason) = available() {
        println!("skipped: {reason}");
        return;
    }
    let ascending: Vec<i32> = (0..128).collect();
    assert_eq!(tickets(Order::InOrder), ascending);
    assert_eq!(tickets(Order::WarpByWarp), ascending);
    assert_eq!(tickets(Order::Reversed), (0..128).rev().collect::<Vec<_>>());
    let (one, two) = (tickets(Order::Random(1)), tickets(Order::Random(2)));
    assert_eq!(one, tickets(Order::Random(1)));
    assert_ne!(one, two);
    let mut sorted = one;
    sorted.sort_unstable();
    assert_eq!(sorted, ascending);
}

#[test]
fn new_memory_is_zero_or_poison() {
    for (poison, byte) in [(false, 0), (true, 0xff)] {
        let options = Options { poison, ..Options::default() };
        match Emulator::new(options) {
            Err(reason) => println!("skipped: {reason}"),
            Ok(mut device) => {
                let at = device.alloc(1000).unwrap();
                assert_eq!(at % 256, 0);
                assert_eq!(get::<u8>(&device, at, 1000), [byte; 1000]);
            }
        }
    }
}

#[test]
fn norm_is_near_to_f64() {
    let (rows, width) = (5, 1000);
    let mut rng = Rng(4);
    let (x, add) = (rng.floats(rows * width), rng.floats(rows * width));
    let weight = rng.floats(width);
    each(|device| {
        let step = put(device, &[rows as u32 - 1]);
        let (x_at, add_at) = (put(device, &x), put(device, &add));
        let (weight_at, out) = (put(device, &weight), put(device, &vec![9.0f32; rows * width]));
        let pointers = [step, x_at, add_at, weight_at, out].map(Pointer);
        let args = [&pointers[..], &[Int(width as i32), Float(1e-5)]].concat();
        device.launch("rms_norm", [1, rows as u32, 1], 256, 0, &args).unwrap();
        let (sums, out) =
            (get::<f32>(device, x_at, rows * width), get::<f32>(device, out, rows * width));
        for row in 0..rows - 1 {
            let range = row * width..(row + 1) * width;
            let sum: Vec<f32> = range.clone().map(|i| x[i] + add[i]).collect();
            assert_eq!(sums[range.clone()], sum);
            let square: f64 = sum.iter().map(|&v| f64::from(v).powi(2)).sum();
            let inverse = 1.0 / (square / width as f64 + 1e-5).sqrt();
            for (i, got) in out[range].iter().enumerate() {
                let right = f64::from(sum[i]) * inverse * f64::from(weight[i]);
                // Fewer than 16 roundings in a row, of 2^-24 each.
                assert!((f64::from(*got) - right).abs() <= 1e-6 * right.abs(), "{got} {right}");
            }
        }
        // The last row is none of the step's.
        assert_eq!(out[(rows - 1) * width..], vec![9.0; width]);
    });
}

/// A block of activations as int8: values, scale and sum.
fn quantize(x: &[f32]) -> (Vec<i8>, f32, i32) {
    let most = x.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    let inverse = 127.0 / most;
    let codes: Vec<i8> = x.iter().map(|v| (v * inverse).round_ties_even() as i8).collect();
    let sum = codes.iter().map(|&q| i32::from(q)).sum();
    (codes, most / 127.0, sum)
}

#[test]
fn quantize_has_the_bits_of_a_scalar_one() {
    let (rows, blocks, block, stride) = (3usize, 21usize, 64usize, 64usize);
    let width = blocks * block;
    let x = Rng(5).floats(rows * width);
    each(|device| {
        let counts = put(device, &[rows as u32]);
        let (x_at, quads) = (put(device, &x), device.alloc(rows * width).unwrap());
        let scales = device.alloc(rows * blocks * 8).unwrap();
        let mut args = vec![Pointer(counts), Pointer(x_at), Int(width as i32)];
        args.extend([0, quads, scales].map(Pointer));
        args.extend([blocks, block, stride].map(|n| Int(n as i32)));
        let grid = [blocks.div_ceil(16) as u32, rows as u32, 1];
        device.launch("quantize", grid, 256, 0, &args).unwrap();
        let codes = get::<u8>(device, quads, rows * width);
        let scales = get::<u32>(device, scales, rows * blocks * 2);
        for (i, x) in x.chunks_exact(block).enumerate() {
            let (right, scale, sum) = quantize(x);
            let got: Vec<i8> =
                codes[i * block..][..block].iter().map(|b| b.cast_signed()).collect();
            assert_eq!(got, right);
            assert_eq!(scales[2 * i..][..2], [scale.to_bits(), sum.cast_unsigned()]);
        }
    });
}

#[test]
fn every_file_has_kernels() {
    if available().is_ok() {
        let kernels = kernels();
        for name in [
            "rms_norm",
            "quantize",
            "linear_w4_s64_m8",
            "linear_f16_t1_m8",
            "attend",
            "selftest_empty",
        ] {
            assert!(kernels.contains(&name), "{kernels:?}");
        }
    }
}
