//! The presets of hivemind 1.1.12's `benchmark_throughput.py`: its names, its numbers.

use clap::ValueEnum;
use serde::Serialize;

/// What a preset sets; each number has an option of its own.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Numbers {
    /// Class of the experts.
    pub expert_cls: String,
    /// How many there are.
    pub experts: usize,
    /// Callers, each of which waits for its answer before it calls again.
    pub clients: usize,
    /// Rows of a call.
    pub batch: usize,
    /// Rows of a batch at the most.
    pub max_batch_size: usize,
    /// Width.
    pub hidden: usize,
    /// Whether each forward call is followed by a backward call.
    pub backward: bool,
}

/// Names of presets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Preset {
    /// 16 experts of width 1024, 128 clients, 2048 rows, forward and backward
    #[value(alias = "default")]
    FfnForwardBackward,
    /// The same without backward
    FfnForward,
    /// 4 experts, 32 rows, forward
    FfnSmallBatch,
    /// One expert, 512 clients, 1 row, forward and backward
    #[value(name = "ffn_small_batch_512clients")]
    FfnSmallBatch512,
    /// The same: here there are no handlers to be counted
    #[value(name = "ffn_small_batch_512clients_32handlers")]
    FfnSmallBatch512Handlers32,
    /// 512 clients, 512 rows, forward
    FfnMassive,
    /// One expert, one client, 2048 rows, forward and backward
    Minimalistic,
    /// Experts that return their input, 128 clients, 2048 rows, forward
    Nop,
}

impl Preset {
    /// Its numbers.
    pub fn numbers(self) -> Numbers {
        let default = Numbers {
            expert_cls: "ffn".to_owned(),
            experts: 16,
            clients: 128,
            batch: 2048,
            max_batch_size: 8192,
            hidden: 1024,
            backward: true,
        };
        match self {
            Preset::FfnForwardBackward => default,
            Preset::FfnForward => Numbers { backward: false, ..default },
            Preset::FfnSmallBatch => Numbers { backward: false, experts: 4, batch: 32, ..default },
            Preset::FfnSmallBatch512 | Preset::FfnSmallBatch512Handlers32 => {
                Numbers { experts: 1, batch: 1, clients: 512, ..default }
            }
            Preset::FfnMassive => Numbers { backward: false, clients: 512, batch: 512, ..default },
            Preset::Minimalistic => Numbers { experts: 1, clients: 1, ..default },
            Preset::Nop => Numbers { expert_cls: "nop".to_owned(), backward: false, ..default },
        }
    }
}
