//! xts: how fast sectors are encrypted and decrypted by one core, by VirtualBox's two ciphers. The wish is 4 GB/s with AES
//! instructions.
//!
//!     cargo run --release --example xts -- --seconds 2 --bytes 65536

use clap::Parser;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vdblk::filter::{Cipher, Crypt, Filter, KeyStore};
use vdblk::map::GuestOffset;

/// Bytes per second through the encryption of disks, on one core.
#[derive(Parser)]
struct Args {
    /// For each cipher and direction
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Bytes of a request, a multiple of 512
    #[arg(long, default_value_t = 65536)]
    bytes: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.bytes == 0 || !args.bytes.is_multiple_of(512) {
        eprintln!("xts: --bytes is a multiple of 512");
        return ExitCode::from(2);
    }
    for cipher in Cipher::ALL {
        let crypt = KeyStore::new_key(cipher).and_then(|key| Crypt::new(cipher, &key));
        let crypt = match crypt {
            Ok(crypt) => crypt,
            Err(e) => {
                eprintln!("xts: {e}");
                return ExitCode::FAILURE;
            }
        };
        let write = rate(&args, |at, bytes| crypt.on_write(at, bytes));
        let read = rate(&args, |at, bytes| crypt.on_read(at, bytes));
        println!(
            "{cipher}: encrypts {write:.2} GB/s, decrypts {read:.2} GB/s ({} bytes at a time)",
            args.bytes
        );
    }
    ExitCode::SUCCESS
}

/// GB/s. The best of several rounds: others may use the core, too.
fn rate(args: &Args, go: impl Fn(GuestOffset, &mut [u8])) -> f64 {
    let mut bytes = vec![0x5a; args.bytes];
    let calls = (16 << 20) / args.bytes + 1;
    let (mut best, end) = (f64::MAX, Instant::now() + Duration::from_secs_f64(args.seconds));
    while Instant::now() < end {
        let begun = Instant::now();
        for n in 0..calls as u64 {
            go(GuestOffset(n * args.bytes as u64), std::hint::black_box(&mut bytes));
        }
        best = best.min(begun.elapsed().as_secs_f64());
    }
    (calls * args.bytes) as f64 / best / 1e9
}
