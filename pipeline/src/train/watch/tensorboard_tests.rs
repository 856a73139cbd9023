//! Event files read back by a parser that shares nothing with the writer, with a checksum by table instead of bit by bit.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;

/// CRC-32C by a table of bytes.
fn by_table(bytes: &[u8]) -> u32 {
    let table: Vec<u32> = (0..256u32)
        .map(|mut entry| {
            for _ in 0..8 {
                entry = if entry & 1 == 1 { 0x82f6_3b78 ^ (entry >> 1) } else { entry >> 1 };
            }
            entry
        })
        .collect();
    let mut crc = u32::MAX;
    for byte in bytes {
        crc = table[((crc ^ u32::from(*byte)) & 0xff) as usize] ^ (crc >> 8);
    }
    u32::MAX - crc
}

#[test]
fn checksums_are_those_of_the_standard() {
    // RFC 3720, B.4, and the check value of the catalogue of CRC algorithms.
    let rising: Vec<u8> = (0..32).collect();
    let falling: Vec<u8> = (0..32).rev().collect();
    let known: [(&[u8], u32); 6] = [
        (&[0; 32], 0x8a91_36aa),
        (&[0xff; 32], 0x62a8_ab43),
        (&rising, 0x46dd_794e),
        (&falling, 0x113f_db5c),
        (b"123456789", 0xe306_9283),
        (b"", 0),
    ];
    for (bytes, crc) in known {
        assert_eq!(crc32c(bytes), crc, "{bytes:?}");
        assert_eq!(by_table(bytes), crc, "{bytes:?}");
    }
    // LevelDB's definition, which TFRecord took over: rotated right by 15, plus a constant.
    assert_eq!(masked(0), 0xa282_ead8);
    assert_eq!(masked(0x0000_8000), 0xa282_ead9);
    assert_eq!(masked(1), 0xa284_ead8);
}

/// One field of a protobuf message.
#[derive(Debug, PartialEq, Clone)]
enum Field {
    Varint(u64),
    Fixed64([u8; 8]),
    Fixed32([u8; 4]),
    Bytes(Vec<u8>),
}

fn number(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value += u64::from(byte % 128) << shift;
        shift += 7;
        if byte < 128 {
            return value;
        }
    }
}

fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let key = number(&mut bytes);
        let take = |n: usize, bytes: &mut &[u8]| {
            let (head, rest) = bytes.split_at(n);
            *bytes = rest;
            head.to_vec()
        };
        let field = match key % 8 {
            0 => Field::Varint(number(&mut bytes)),
            1 => Field::Fixed64(take(8, &mut bytes).try_into().unwrap()),
            2 => {
                let n = number(&mut bytes) as usize;
                Field::Bytes(take(n, &mut bytes))
            }
            5 => Field::Fixed32(take(4, &mut bytes).try_into().unwrap()),
            other => panic!("wire type {other}"),
        };
        all.push((key / 8, field));
    }
    all
}

/// The messages of a file whose frames hold.
fn messages(mut file: &[u8]) -> Vec<Vec<(u64, Field)>> {
    let unmask = |stored: u32| stored.wrapping_sub(0xa282_ead8).rotate_left(15);
    let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
    let mut all = Vec::new();
    while !file.is_empty() {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        assert_eq!(unmask(word(&file[8..12])), by_table(&file[..8]));
        let message = &file[12..12 + length];
        assert_eq!(unmask(word(&file[12 + length..16 + length])), by_table(message));
        all.push(fields(message));
        file = &file[16 + length..];
    }
    all
}

#[test]
fn a_file_is_read_back() {
    let out = tempfile::tempdir().unwrap();
    let mut board = Board::create(out.path(), 1).unwrap();
    // 300 needs two bytes of seven bits; a tag of 200 letters a length of two bytes.
    let long = "x".repeat(200);
    board.scalars(300, &[("train/loss".into(), 1.25), (long.clone(), -0.1)]).unwrap();
    board.scalars(u64::from(u32::MAX) + 5, &[]).unwrap();
    let found = messages(&std::fs::read(&board.path).unwrap());
    assert_eq!(found.len(), 4);
    let now = since_1970().as_secs_f64();
    for event in &found {
        let Field::Fixed64(time) = event[0].1 else { panic!("{event:?}") };
        assert!(event[0].0 == 1 && (now - f64::from_le_bytes(time)).abs() < 600.0, "{event:?}");
    }
    let rest = |i: usize| found[i][1..].to_vec();
    assert_eq!(rest(0), [(2, Field::Varint(0)), (3, Field::Bytes(b"brain.Event:2".to_vec()))]);
    let Field::Bytes(log) = &rest(1)[1].1 else { panic!("{:?}", found[1]) };
    assert_eq!((&rest(1)[0], rest(1)[1].0, fields(log)), (&(2, Field::Varint(1)), 7, vec![(1, Field::Varint(1))]));
    let Field::Bytes(summary) = &rest(2)[1].1 else { panic!("{:?}", found[2]) };
    let scalars: Vec<_> = fields(summary)
        .into_iter()
        .map(|(field, value)| match value {
            Field::Bytes(value) if field == 1 => fields(&value),
            other => panic!("{field} {other:?}"),
        })
        .collect();
    let scalar =
        |tag: &str, value: f32| vec![(1, Field::Bytes(tag.as_bytes().to_vec())), (2, Field::Fixed32(value.to_le_bytes()))];
    assert_eq!((&rest(2)[0], scalars), (&(2, Field::Varint(300)), vec![scalar("train/loss", 1.25), scalar(&long, -0.1)]));
    assert_eq!(rest(3), [(2, Field::Varint((1 << 32) + 4)), (5, Field::Bytes(vec![]))]);
}

#[test]
fn each_process_has_a_file_that_sorts_last() {
    let out = tempfile::tempdir().unwrap();
    let ahead = out.path().join(FOLDER).join(format!("{PREFIX}4000000000.elsewhere"));
    std::fs::create_dir_all(out.path().join(FOLDER)).unwrap();
    std::fs::write(&ahead, "").unwrap();
    std::fs::write(out.path().join(FOLDER).join("notes.txt"), "").unwrap();
    let names: Vec<PathBuf> = (0..3).map(|next| Board::create(out.path(), next).unwrap().path).collect();
    assert!(ahead < names[0] && names.is_sorted() && names[1] != names[2], "{names:?}");
    assert!(names[0].file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents.4000000001."), "{names:?}");
}
