"""Models on the Hugging Face hub, named ORG/NAME or ORG/NAME@REVISION, or by their address.

A path that exists is never taken for an id. What is downloaded is one revision's, and is kept in the hub's cache, where
other programs find it; parts of files are read by range requests. The package huggingface_hub does all requests; it
also knows the user's token and the environment variables HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.][\w./-]*))?")
ADDRESS = re.compile(r"https?:/+(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/tree/([^?#]+))?/?(?:[?#].*)?")
LOCAL = (".emoe", ".json", ".gguf", ".safetensors")  # endings of files, rather than of names on the hub
BUNDLE = "bundle.json"
HEADER_BYTES = 1 << 18  # of a safetensors file: the first request; most headers are shorter
MOST_HEADER_BYTES = 100_000_008  # the limit of the safetensors library; what claims more is not asked for


@dataclass(frozen=True, slots=True)
class HubModel:
    """One revision of a model on the hub."""

    given: str  # as the user named it
    name: str  # ORG/NAME
    commit: str
    files: tuple[str, ...]

    @classmethod
    def open(cls, given: str | Path) -> "HubModel | None":
        """Ask the hub for a model; None if `given` is a path.

        Raises FileNotFoundError if the hub has no such model or revision, PermissionError if it is gated,
        ConnectionError if the hub cannot be reached, and another OSError without the package huggingface_hub.
        """
        if (found := hub_id(given)) is None:
            return None
        name, revision = found
        with _errors(str(given), name, revision):
            from huggingface_hub import HfApi

            info = HfApi().model_info(name, revision=revision)
        return cls(str(given), name, info.sha, tuple(one.rfilename for one in info.siblings))

    def check(self) -> None:
        """Raise FileNotFoundError if there is no config.json, as where there are GGUF files alone."""
        if "config.json" not in self.files:
            found = next((file for file in self.files if file.endswith(".gguf")), None)
            hint = f"; `hf download {self.name} {found}` gets one of its GGUF files: name that" if found else ""
            raise FileNotFoundError(f"{self.given}: has no config.json on the hub{hint}")

    @property
    def is_bundle(self) -> bool:
        return BUNDLE in self.files

    def download(self, file: str) -> Path:
        """The path of a file in the cache, downloaded if it is not there."""
        with _errors(self.given, self.name, self.commit):
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(self.name, file, revision=self.commit))

    def download_all(self) -> Path:
        """The directory in the cache with all files of a bundle or checkpoint, downloaded if they are not there."""
        wanted = [file for file in self.files if file.endswith((".json", ".safetensors", ".jinja", ".txt"))]
        wanted = [file for file in wanted if "/" not in file or file.endswith(".jinja")]
        with _errors(self.given, self.name, self.commit):
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(self.name, revision=self.commit, allow_patterns=wanted))

    def part(self, file: str, first: int, count: int) -> tuple[bytes, int]:
        """Read `count` bytes of a file from `first` on, fewer if it ends before; gives them and the file's size.

        Raises OSError if the server sends anything else.
        """
        with _errors(self.given, self.name, self.commit):
            from huggingface_hub import hf_hub_url
            from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

            url = hf_hub_url(self.name, file, revision=self.commit)
            headers = {**build_hf_headers(), "range": f"bytes={first}-{first + count - 1}"}
            answer = get_session().get(url, headers=headers, timeout=60)
            hf_raise_for_status(answer)
            span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("content-range", ""))
        if not span or int(span[1]) != first or len(answer.content) != min(count, int(span[3]) - first):
            raise OSError(f"{self.given}: the hub did not answer with the part of {file} that was asked for; try again")
        return answer.content, int(span[3])

    def header(self, file: str) -> tuple[bytes, int]:
        """The header of a safetensors file, its length included, and the size of the file."""
        head, size = self.part(file, 0, HEADER_BYTES)
        length = min(8 + int.from_bytes(head[:8], "little"), size, MOST_HEADER_BYTES)
        if len(head) < length:
            head += self.part(file, len(head), length - len(head))[0]
        return head[:length], size


def hub_id(given: str | Path) -> tuple[str, str | None] | None:
    """The name and the revision, None for main's, if `given` is no path but names a model on the hub."""
    path, text = Path(given), str(given)
    if found := ADDRESS.fullmatch(text):
        return found[1], found[2]
    found = ID.fullmatch(text)
    if not found or path.exists() or path.is_symlink() or path.suffix in LOCAL or path.parent.is_dir():
        return None
    return found[1], found[2]


def bundle_of(given: str | Path) -> Path | None:
    """The directory of a bundle on the hub, downloaded; None if `given` is a path.

    Raises what HubModel.open() raises, and ValueError for a model that is no bundle.
    """
    model = HubModel.open(given)
    if model is None:
        return None
    if not model.is_bundle:
        raise ValueError(
            f"{given}: is a model on the hub, not a bundle; make one with `edge-moe compress {given} "
            f"{model.name.partition('/')[2]}.emoe`"
        )
    return model.download_all()


def local_copy(given: str | Path) -> str | Path:
    """What `given` names, downloaded if it is on the hub."""
    model = HubModel.open(given)
    return model.download_all() if model else given


def write_headers(model: HubModel, files: Iterable[str], directory: Path) -> dict[str, int]:
    """Write safetensors files of the right sizes, of which the headers alone are true; gives the sizes, by name.

    The rest of each file is a hole, which takes no room.
    """
    from concurrent.futures import ThreadPoolExecutor

    files = list(files)
    with ThreadPoolExecutor(8) as pool:
        sizes = {}
        for file, (head, size) in zip(files, pool.map(model.header, files), strict=True):
            with open(directory / file, "wb") as out:
                out.write(head)
                out.truncate(size)
            sizes[file] = size
    return sizes


@contextmanager
def _errors(given: str, name: str, revision: str | None) -> Iterator[None]:
    """Raise errors of huggingface_hub as errors that say what to do."""
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        raise OSError(
            f"{given}: no such file or directory, but it looks like a model on the Hugging Face hub; "
            f"pip install 'edge-moe[hub]' to use it by name, or download it with `hf download {name} "
            f"--local-dir {name.partition('/')[2]}`"
        ) from None
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(
            f"{given}: is gated; ask for access at https://huggingface.co/{name}, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{given}: no such file or directory, and no such model on the Hugging Face hub, or it is private; "
            "`hf auth login` lets you use your own"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{given}: {name} on the Hugging Face hub has no revision {revision}") from None
    except OSError as error:
        if isinstance(error, errors.HfHubHTTPError | errors.OfflineModeIsEnabled | ConnectionError):
            raise _unreachable(given, name, error, Path(constants.HF_HUB_CACHE)) from None
        raise
    except Exception as error:  # of the package's HTTP client, which has changed
        if "httpx" in type(error).__module__ or "requests" in type(error).__module__:
            raise _unreachable(given, name, error, Path(constants.HF_HUB_CACHE)) from None
        raise


def _unreachable(given: str, name: str, error: Exception, cache: Path) -> ConnectionError:
    copy = cache / f"models--{name.replace('/', '--')}"
    hint = f"; what was downloaded before is {copy}" if copy.is_dir() else ""
    said = " ".join(str(error).split())[:200]
    return ConnectionError(f"{given}: no such file or directory, and the hub cannot be reached ({said}){hint}")
