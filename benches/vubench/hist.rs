//! Log-linear latency histogram: 128 steps per power of two (error below 0.8 %).

const SUB: u32 = 7;

pub(crate) struct Hist {
    n: Vec<u64>,
    pub(crate) count: u64,
    max: u64,
    sum: u64,
}

impl Hist {
    pub(crate) fn new() -> Hist {
        Hist { n: vec![0; (64 << SUB) as usize], count: 0, max: 0, sum: 0 }
    }

    pub(crate) fn add(&mut self, ns: u64) {
        let ns = ns.max(1);
        let e = 63 - ns.leading_zeros();
        let i = if e < SUB { ns } else { u64::from((e - SUB + 1) << SUB) + ((ns >> (e - SUB)) - (1 << SUB)) };
        self.n[i as usize] += 1;
        self.count += 1;
        self.sum += ns;
        self.max = self.max.max(ns);
    }

    pub(crate) fn merge(&mut self, o: &Hist) {
        self.n.iter_mut().zip(&o.n).for_each(|(a, b)| *a += b);
        self.count += o.count;
        self.sum += o.sum;
        self.max = self.max.max(o.max);
    }

    pub(crate) fn mean_us(&self) -> f64 {
        self.sum as f64 / self.count.max(1) as f64 / 1e3
    }

    pub(crate) fn max_us(&self) -> f64 {
        self.max as f64 / 1e3
    }

    pub(crate) fn pct_us(&self, p: f64) -> f64 {
        let want = (self.count as f64 * p / 100.0).ceil() as u64;
        let mut seen = 0;
        for (i, n) in self.n.iter().enumerate() {
            seen += n;
            if seen >= want && seen > 0 {
                let (g, s) = ((i as u64) >> SUB, i as u64 & ((1 << SUB) - 1));
                let v = if g == 0 { s } else { ((1 << SUB) + s) << (g - 1) };
                return v.min(self.max) as f64 / 1e3;
            }
        }
        0.0
    }
}
