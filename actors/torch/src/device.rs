//! Where experts compute: `cpu`, `cuda`, `cuda:1`.

use tch::Device;

use crate::{Error, process};

/// Reads `cpu`, `cuda` (the first one) or `cuda:n`.
pub fn parse_device(text: &str) -> Result<Device, Error> {
    let parsed = match text.trim() {
        "cpu" => Some(Device::Cpu),
        "cuda" => Some(Device::Cuda(0)),
        other => other.strip_prefix("cuda:").and_then(|n| n.parse().ok()).map(Device::Cuda),
    };
    parsed.ok_or_else(|| Error::Config(format!("no device is called {text:?}; try cpu, cuda or cuda:0")))
}

/// Fails when the process cannot compute on `device`. For CUDA it loads libtorch_cuda first, if nobody has: that belongs
/// before the process's first question about CUDA, whose answer torch keeps (see [`process::tune`](crate::process::tune)).
pub fn check_device(device: Device) -> Result<(), Error> {
    match device {
        Device::Cpu => Ok(()),
        Device::Cuda(n) => match process::load_cuda(process::CUDA_LIBRARY) {
            Ok(count) if n < count => Ok(()),
            Ok(0) => Err(Error::Config(format!(
                "device cuda:{n} is not there: libtorch_cuda finds no CUDA device; is the NVIDIA driver loaded (nvidia-smi), \
                 and does CUDA_VISIBLE_DEVICES name one?"
            ))),
            Ok(count) => Err(Error::Config(format!("device cuda:{n} is not there: there are {count}, from cuda:0 on"))),
            Err(error) => Err(error),
        },
        other => Err(Error::Config(format!("experts do not run on {other:?}; try cpu or cuda:0"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_in_torch() {
        assert_eq!(parse_device("cpu").unwrap(), Device::Cpu);
        assert_eq!(parse_device("cuda").unwrap(), Device::Cuda(0));
        assert_eq!(parse_device("cuda:3").unwrap(), Device::Cuda(3));
        for wrong in ["", "gpu", "cuda:", "cuda:-1"] {
            assert!(parse_device(wrong).unwrap_err().to_string().contains("try cpu"));
        }
    }
}
