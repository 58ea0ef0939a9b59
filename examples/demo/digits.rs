//! The data: 1797 handwritten digits of 8 × 8 pixels, shuffled once and split into training and held-out rows.

use std::io::Read;

use rand::{SeedableRng, seq::SliceRandom};
use skep::tch::{Kind, Tensor};

const DIGITS: &[u8] = include_bytes!("../data/digits.csv.gz");
const HELD_OUT: usize = 600;

/// Pixels `[rows, 64]` scaled to 0..1 and labels `[rows]`.
pub struct Split {
    pub pixels: Tensor,
    pub labels: Tensor,
}

/// Training rows and held-out rows; the same split every time.
pub fn load() -> Result<(Split, Split), Box<dyn std::error::Error>> {
    let mut text = String::new();
    flate2::read::GzDecoder::new(DIGITS).read_to_string(&mut text)?;
    let mut rows = Vec::new();
    for line in text.lines() {
        let values: Vec<f32> = line.split(',').map(str::parse).collect::<Result<_, _>>()?;
        let [pixels @ .., label] = values.as_slice() else { return Err("an empty line".into()) };
        rows.push((pixels.iter().map(|p| p / 16.0).collect::<Vec<f32>>(), *label as i64));
    }
    rows.shuffle(&mut rand_chacha::ChaCha8Rng::seed_from_u64(0));
    let train = rows.split_off(HELD_OUT);
    Ok((split(&train)?, split(&rows)?))
}

fn split(rows: &[(Vec<f32>, i64)]) -> Result<Split, Box<dyn std::error::Error>> {
    let pixels: Vec<f32> = rows.iter().flat_map(|(pixels, _)| pixels.iter().copied()).collect();
    let labels: Vec<i64> = rows.iter().map(|(_, label)| *label).collect();
    let pixels = Tensor::f_from_slice(&pixels)?.f_view([rows.len() as i64, -1])?.f_to_kind(Kind::Float)?;
    Ok(Split { pixels, labels: Tensor::f_from_slice(&labels)? })
}
