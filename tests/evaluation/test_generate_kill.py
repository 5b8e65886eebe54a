import subprocess
import sys
from pathlib import Path


def test_killed_at_ten_moments_the_images_are_the_same_bytes(base, lora, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a cat number {i}\n" for i in range(9)))
    script = Path(__file__).parent / "kill_images.py"
    command = [sys.executable, str(script), str(base), str(lora), str(prompts), str(tmp_path), "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3  # so many were under way when they were killed

    def contents(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    expected = contents(tmp_path / "unbroken")
    assert len(expected) == 2 * 9 * 2 + 1
    assert contents(tmp_path / "broken") == expected
