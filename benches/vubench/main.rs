//! vubench: a vhost-user-blk front-end without a VM. See README.md.
mod args;
mod attach;
mod cpu;
mod dev;
mod features;
mod fuzz;
mod hist;
mod load;
mod mem;
mod queue;
mod ring;
mod rng;
mod server;
mod sys;
mod verify;

use args::Args;
use attach::open;
use clap::{Parser, ValueEnum};
use dev::{Dev, Opts, close};
use features::names;
use serde_json::json;
use server::Server;
use std::io;
use std::process::ExitCode;
use std::time::Instant;

/// Exit statuses.
const GOOD: u8 = 0;
const BAD: u8 = 1;
const NO_SETUP: u8 = 2;
const SERVER_GONE: u8 = 3;

fn main() -> ExitCode {
    ExitCode::from(run(&Args::parse()).unwrap_or_else(|e| {
        eprintln!("vubench: {e}");
        NO_SETUP
    }))
}

fn run(a: &Args) -> io::Result<u8> {
    let begun = Instant::now();
    let o = a.opts();
    let start = |c: &String| Server::start(c, &o.socket);
    let mut server = a.server_cmd.as_ref().map(start).transpose()?;
    let mut status = if a.info {
        info(&o)?
    } else if a.fuzz_chain {
        judged(fuzz::run(&o, server.as_mut())?)
    } else if a.verifying() {
        check(a, &o, server.as_mut())?
    } else {
        measure(a, &o, server.as_ref(), begun)?
    };
    if let Some(Err(how)) = server.as_mut().map(Server::stop) {
        eprintln!("vubench: the server did not end well: {how}");
        status = BAD;
    }
    Ok(status)
}

fn judged(good: bool) -> u8 {
    if good { GOOD } else { BAD }
}

fn measure(a: &Args, o: &Opts, server: Option<&Server>, begun: Instant) -> io::Result<u8> {
    let mut j = a.job();
    let (dev, mut qs) = open(o, j.depth, j.bs)?;
    if j.size == 0 {
        j.size = dev.info.capacity().saturating_sub(j.offset);
    }
    let pid = a.server_pid.or(server.and_then(Server::pid));
    let ready = begun.elapsed();
    let r = load::run(&mut qs, &j, pid)?;
    let rw = j.rw.to_possible_value();
    let ios = r.hist.count as f64;
    let c = r.cpu;
    let round = |v: f64, digits: i32| (v * 10f64.powi(digits)).round() / 10f64.powi(digits);
    let result = json!({
        "tag": a.tag, "rw": rw.as_ref().map(|v| v.get_name()), "bs": j.bs, "iodepth": j.depth,
        "queues": o.queues, "poll": j.poll, "secs": round(r.secs, 3), "ios": r.hist.count,
        "iops": round(ios / r.secs, 0), "mb_s": round(ios * j.bs as f64 / r.secs / 1e6, 1),
        "lat_us": {
            "mean": round(r.hist.mean_us(), 1), "p50": round(r.hist.pct_us(50.0), 1),
            "p99": round(r.hist.pct_us(99.0), 1), "p999": round(r.hist.pct_us(99.9), 1),
            "max": round(r.hist.max_us(), 1),
        },
        "cli_cpu_s": round(c.client, 3), "srv_cpu_s": round(c.server, 3),
        "srv_user_s": round(c.server_user, 2), "srv_sys_s": round(c.server_sys, 2),
        "srv_us_io": round(c.server * 1e6 / ios.max(1.0), 2), "other_cpu_s": round(c.others(), 2),
        "kicks": r.kicks, "wakes": r.wakes, "errors": r.errors, "bad_used_len": r.bad_len,
        "ready_ms": round(ready.as_secs_f64() * 1e3, 2), "srv_rss_kb": pid.and_then(cpu::own_memory_kb),
        "stalled": r.stalled, "features": format!("{:#x}", dev.info.acked),
    });
    println!("{result}");
    if !r.stalled {
        close(dev, o.queues);
    }
    Ok(judged(r.errors == 0 && r.bad_len == 0 && !r.stalled))
}

fn info(o: &Opts) -> io::Result<u8> {
    let d = Dev::connect(o)?;
    let i = &d.info;
    println!("features offered  {:#x} {}", i.offered, names(i.offered));
    println!("features acked    {:#x} {}", i.acked, names(i.acked));
    println!("protocol offered  {:#x} {:?}", i.proto_offered.bits(), i.proto_offered);
    println!("protocol acked    {:?}", i.proto);
    println!("max queues {}  max mem slots {}", i.max_queues, i.max_slots);
    println!(
        "capacity {} size_max {} seg_max {} blk_size {} phys_exp {} align_off {} min_io {} opt_io {} wce {} num_queues {}",
        i.capacity(),
        i.c32(8),
        i.c32(12),
        i.blk_size(),
        i.c8(24),
        i.c8(25),
        i.c16(26),
        i.c32(28),
        i.c8(32),
        i.c16(34)
    );
    println!(
        "max_discard_sectors {} max_discard_seg {} discard_alignment {} max_wz_sectors {} max_wz_seg {} wz_may_unmap {}",
        i.c32(36),
        i.max_discard_seg(),
        i.c32(44),
        i.c32(48),
        i.c32(52),
        i.c8(56)
    );
    Ok(GOOD)
}

/// Median and maximum.
fn resume(mut ms: Vec<f64>) -> serde_json::Value {
    ms.sort_by(f64::total_cmp);
    let round = |v: Option<&f64>| v.map(|v| (v * 10.0).round() / 10.0);
    json!({ "p50": round(ms.get(ms.len() / 2)), "max": round(ms.last()) })
}

fn check(a: &Args, o: &Opts, server: Option<&mut Server>) -> io::Result<u8> {
    let (s, i) = verify::run(o, a.verify_cfg(), server)?;
    for l in &s.told {
        eprintln!("{l}");
    }
    let result = json!({
        "writes": s.writes, "reads": s.reads, "write_zeroes": s.write_zeroes,
        "discards": s.discards, "flushes": s.flushes, "errors": s.errors, "unsupp": s.unsupp,
        "bad_used_len": s.bad_len, "mismatches": s.mismatches,
        "discard_sectors_zero": s.discard_zero, "discard_sectors_old": s.discard_old,
        "stale_after_crash": s.stale_after_crash, "kills": s.kills,
        "in_flight_at_kills": s.in_flight_at_kills, "duplicates": s.duplicates, "lost": s.lost,
        "server_gone": s.server_gone, "features": format!("{:#x}", i.acked),
        "inflight": i.inflight(), "resume_ms": resume(s.resume_ms),
    });
    println!("{result}");
    let wrong = s.mismatches + s.errors + s.bad_len + s.duplicates + s.lost;
    Ok(if wrong == 0 && s.server_gone { SERVER_GONE } else { judged(wrong == 0) })
}
