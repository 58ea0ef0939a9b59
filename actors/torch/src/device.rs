//! Where experts compute: `cpu`, `cuda`, `cuda:1`.

use tch::Device;

use crate::Error;

/// Reads `cpu`, `cuda` (the first one) or `cuda:n`.
pub fn parse_device(text: &str) -> Result<Device, Error> {
    let parsed = match text.trim() {
        "cpu" => Some(Device::Cpu),
        "cuda" => Some(Device::Cuda(0)),
        other => other.strip_prefix("cuda:").and_then(|n| n.parse().ok()).map(Device::Cuda),
    };
    parsed.ok_or_else(|| Error::Config(format!("no device is called {text:?}; try cpu, cuda or cuda:0")))
}

/// Fails when the process cannot compute on `device`. The first call for CUDA decides for the process whether there is
/// any: load it before (see [`process::tune`](crate::process::tune)).
pub fn check_device(device: Device) -> Result<(), Error> {
    match device {
        Device::Cpu => Ok(()),
        Device::Cuda(n) if n < usize::try_from(tch::Cuda::device_count()).unwrap_or(0) => Ok(()),
        Device::Cuda(n) => Err(Error::Config(format!(
            "device cuda:{n} is not there: {} CUDA devices found; is there a driver, and is LIBTORCH a CUDA build?",
            tch::Cuda::device_count()
        ))),
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
