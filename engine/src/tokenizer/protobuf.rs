//! Reads the fields of a protobuf message: just enough for a SentencePiece model.
//!
//! Input is any byte string; what breaks the wire format is an error, never a panic. Groups, long
//! obsolete, are refused. Not here: which field means what.

/// A field's value as the wire has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Wire<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// Iterates over the fields of one message: number and value. Ends after the first error.
#[derive(Debug)]
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn new(message: &'a [u8]) -> Self {
        Self(message)
    }

    fn field(&mut self) -> Result<(u32, Wire<'a>), String> {
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).ok().filter(|n| *n > 0 && *n < 1 << 29);
        let number = number.ok_or_else(|| format!("field number {} is out of range", key >> 3))?;
        let value = match key & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => Wire::Fixed64(u64::from_le_bytes(self.array()?)),
            2 => {
                let len = self.varint()?;
                Wire::Bytes(self.take(len)?)
            }
            5 => Wire::Fixed32(u32::from_le_bytes(self.array()?)),
            other => {
                return Err(format!("field {number} has wire type {other}, which is not used"));
            }
        };
        Ok((number, value))
    }

    /// Seven bits a byte, lowest first, at most 64 bits.
    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number is longer than 64 bits".into())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or("it ends inside a field")?;
        self.0 = tail;
        Ok(*head)
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], String> {
        let short = || format!("a field of {len} bytes, but {} are left", self.0.len());
        let len = usize::try_from(len).map_err(|_| short())?;
        let (head, tail) = self.0.split_at_checked(len).ok_or_else(short)?;
        self.0 = tail;
        Ok(head)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u32, Wire<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<Vec<(u32, Wire<'_>)>, String> {
        Fields::new(bytes).collect()
    }

    #[test]
    fn reads_every_wire_type() {
        let bytes = [
            0x08, 0x96, 0x01, // 1: varint 150
            0x12, 0x02, b'h', b'i', // 2: bytes
            0x1d, 1, 0, 0, 0, // 3: fixed32
            0x21, 2, 0, 0, 0, 0, 0, 0, 0, // 4: fixed64
        ];
        let expected = vec![
            (1, Wire::Varint(150)),
            (2, Wire::Bytes(b"hi")),
            (3, Wire::Fixed32(1)),
            (4, Wire::Fixed64(2)),
        ];
        assert_eq!(read(&bytes), Ok(expected));
    }

    #[test]
    fn a_negative_number_takes_ten_bytes() {
        let bytes = [0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
        assert_eq!(read(&bytes), Ok(vec![(1, Wire::Varint(u64::MAX))]));
    }

    #[test]
    fn broken_input_is_refused() {
        for bytes in [
            &[0x08][..],                                                  // no value
            &[0x08, 0x80],                                                // varint cut
            &[0x0d, 0, 0],                                                // fixed32 cut
            &[0x0a, 5, 1],                                                // bytes cut
            &[0x0b],                                                      // group
            &[0x00, 0],                                                   // field 0
            &[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2],      // 65 bits
            &[0x08, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 1], // 11 bytes
            &[0x0a, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1],      // huge length
        ] {
            assert!(read(bytes).is_err(), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            // Every field takes at least two bytes, so the iterator must end.
            prop_assert!(Fields::new(&bytes).count() <= bytes.len());
        }
    }
}
