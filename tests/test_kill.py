from kill import kill_and_resume


def test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one(shipped, tmp_path):
    options = [str(shipped), "--margin", "column:clipscore_0,clipscore_1", "--keep", "0.2"]
    options += ["--quality", "column:proxy_0", "--diversity", "none"]
    results = kill_and_resume(options, tmp_path, kills=6)
    assert len(results) == 6
    assert [differ for _, differ in results if differ] == []
