//! Bit packing shared by the importers: transposing, widening, reading single codes.
//!
//! Packed codes always fill a little-endian bit stream without gaps: code `i` of `bits` bits lies
//! at bits `i * bits ..` of the stream, words one after another. That covers three-bit codes too,
//! 32 of which fill three words, with two codes across a word boundary.
//!
//! Not here: which axis a format packs along. Input: slices whose lengths the caller has checked.

use std::ops::Range;

/// Words of 32 bits that hold `count` codes (below 2^31) of `bits` bits.
pub(super) fn word_count(count: usize, bits: usize) -> usize {
    (count as u64 * bits as u64).div_ceil(32) as usize
}

/// Code `index` of a bit stream of `bits`-bit codes, `bits` at most 8.
pub(super) fn code_at(stream: &[u8], bits: usize, index: usize) -> u8 {
    let (byte, shift) = (index * bits / 8, index * bits % 8);
    let high = stream.get(byte + 1).copied().unwrap_or(0);
    let pair = u16::from_le_bytes([stream[byte], high]);
    ((pair >> shift) & ((1 << bits) - 1)) as u8
}

/// Side of the square blocks that [`transpose`] works in: sixteen words are one cache line.
const TILE: usize = 16;

/// Columns `keep` of `[rows, columns]` to `[keep, rows]`, in blocks so that each cache line is
/// touched once; a band of rows is read from left to right, which the processor foresees.
pub(super) fn transpose<T: Copy + Default>(
    values: &[T],
    columns: usize,
    keep: Range<usize>,
) -> Vec<T> {
    let rows = values.len() / columns;
    let mut out = vec![T::default(); rows * keep.len()];
    // Where a block is cut short, the rest of the square is left over from before and not used.
    let mut tile = [[T::default(); TILE]; TILE];
    for row in (0..rows).step_by(TILE) {
        for column in keep.clone().step_by(TILE) {
            let (height, width) = (TILE.min(rows - row), TILE.min(keep.end - column));
            for (line, row) in tile.iter_mut().zip(row..row + height) {
                let from = &values[row * columns + column..][..width];
                match <&[T; TILE]>::try_from(from) {
                    Ok(full) => *line = *full,
                    Err(_) => line[..width].copy_from_slice(from),
                }
            }
            let out = &mut out[(column - keep.start) * rows + row..];
            for (c, line) in turn(&tile)[..width].iter().enumerate() {
                let to = &mut out[c * rows..][..height];
                match <&mut [T; TILE]>::try_from(&mut *to) {
                    Ok(full) => *full = *line,
                    Err(_) => to.copy_from_slice(&line[..height]),
                }
            }
        }
    }
    out
}

/// The square turned; its loops have fixed ends and unroll.
fn turn<T: Copy>(tile: &[[T; TILE]; TILE]) -> [[T; TILE]; TILE] {
    std::array::from_fn(|c| std::array::from_fn(|r| tile[r][c]))
}

/// Widens a bit stream of `BITS`-bit codes (2 or 3) to nibbles; eight codes fill `BITS` bytes.
pub(super) fn widen<const BITS: usize>(stream: &[u8]) -> Vec<u8> {
    let (octets, rest) = stream.as_chunks::<BITS>();
    debug_assert!(rest.is_empty(), "rows hold whole octets of codes");
    let mut out = vec![[0; 4]; octets.len()];
    for (nibbles, octet) in out.iter_mut().zip(octets) {
        let codes = octet.iter().rev().fold(0u32, |all, byte| all << 8 | u32::from(*byte));
        let code = |i| codes >> (BITS * i) & ((1 << BITS) - 1);
        *nibbles = (0..8).fold(0, |all, i| all | code(i) << (4 * i)).to_le_bytes();
    }
    out.into_flattened()
}

/// Keeps the first `keep` of every `stride` bytes (rows padded to whole words).
pub(super) fn crop_rows(rows: Vec<u8>, stride: usize, keep: usize) -> Vec<u8> {
    if stride == keep {
        return rows;
    }
    rows.chunks_exact(stride).flat_map(|row| &row[..keep]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::Rng;

    #[test]
    fn transposes_any_shape() {
        for (rows, columns) in [(1, 1), (1, 40), (16, 16), (17, 33), (5, 64), (48, 3)] {
            let values: Vec<usize> = (0..rows * columns).collect();
            for keep in [0..columns, columns / 3..columns, columns / 2..columns / 2 + 1] {
                let turned = transpose(&values, columns, keep.clone());
                assert_eq!(turned.len(), rows * keep.len());
                for (i, v) in turned.iter().enumerate() {
                    let expected = i % rows * columns + keep.start + i / rows;
                    assert_eq!(*v, expected, "{rows} x {columns}, {keep:?} at {i}");
                }
            }
        }
    }

    #[test]
    fn widening_agrees_with_single_codes() {
        let stream = Rng::new(1).bytes(96);
        let wide = (widen::<2>(&stream), widen::<3>(&stream));
        for i in 0..stream.len() * 8 / 3 {
            assert_eq!(code_at(&wide.1, 4, i), code_at(&stream, 3, i), "3 bits, code {i}");
        }
        for i in 0..stream.len() * 8 / 2 {
            assert_eq!(code_at(&wide.0, 4, i), code_at(&stream, 2, i), "2 bits, code {i}");
        }
    }

    #[test]
    fn three_bit_codes_straddle_bytes() {
        // Codes 7, 0, 5, 1 from the lowest bit: 001 101 000 111.
        let stream = 0b001_101_000_111u16.to_le_bytes();
        let codes: Vec<u8> = (0..4).map(|i| code_at(&stream, 3, i)).collect();
        assert_eq!(codes, [7, 0, 5, 1]);
    }
}
