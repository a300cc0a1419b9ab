package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// serveFolder has the disks a.img and b.img of 512 bytes, and hard.img, a link to a.img.
func serveFolder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"a.img", "b.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 512), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "a.img"), filepath.Join(dir, "hard.img")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// settingsIn returns the settings of a file with that text, in which DIR stands for the folder.
func settingsIn(t *testing.T, dir, text string) (*serveSettings, error) {
	t.Helper()
	path := filepath.Join(dir, "exports.toml")
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "DIR", dir)), 0o600); err != nil {
		t.Fatal(err)
	}
	return settingsSource{file: path}.read()
}

func TestServeSettings(t *testing.T) {
	dir := serveFolder(t)
	got, err := settingsIn(t, dir, `
listen = ["127.0.0.1:0", "unix:/run/s"]
certfile = "/c.pem"
cafile = "/ca.pem"
[[export]]
name = "a"
path = "DIR/a.img"
read_only = false
description = "the first"
[[export]]
name = ""
path = "DIR/hard.img"
`)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got.listen, []string{"127.0.0.1:0", "unix:/run/s"}) || got.certfile != "/c.pem" || got.cafile != "/ca.pem" {
		t.Errorf("got %+v", got)
	}
	for i := range got.exports {
		got.exports[i].storage = storage{}
	}
	want := []export{
		{name: "a", path: dir + "/a.img", description: "the first", writable: true},
		{name: "", path: dir + "/hard.img"}, // the same file, but only one of them is writable
	}
	if !slices.Equal(got.exports, want) {
		t.Errorf("got  %+v\nwant %+v", got.exports, want)
	}
	got, err = settingsIn(t, dir, "[[export]]\nname = 'a'\npath = 'DIR/a.img'\n")
	if err != nil || !slices.Equal(got.listen, []string{"localhost:10809"}) || got.exports[0].writable {
		t.Errorf("defaults: got %+v, %v", got, err)
	}
}

// TestServeSettingsMistakes: each mistake is refused, with its line.
func TestServeSettingsMistakes(t *testing.T) {
	dir := serveFolder(t)
	const a = "[[export]]\nname = 'a'\npath = 'DIR/a.img'\n"
	for _, tt := range []struct{ name, text, want string }{
		{"empty", "", "no [[export]]: nothing to serve"},
		{"syntax", "listen = \n" + a, "line 1: listen: "},
		{"type", a + "read_only = 'yes'\n", "line 4: export.read_only: "},
		{"unknown key", "listn = ['localhost:1']\n" + a, `line 1: unknown key "listn"`},
		{"key in upper case", a + "[[export]]\nname = 'b'\npath = 'DIR/b.img'\nRead_Only = false\n", `line 7: unknown key "export.Read_Only"; it is spelt "export.read_only"`},
		{"address in upper case", "Listen = ['localhost:1']\n" + a, `line 1: unknown key "Listen"; it is spelt "listen"`},
		{"unknown key of an export", a + "[[export]]\nname = 'b'\nreadonly = true\npath = 'DIR/b.img'\n", `line 6: unknown key "export.readonly"`},
		{"unknown table", a + "[exports.b]\npath = 'DIR/b.img'\n", `line 4: unknown key "exports`},
		{"no name", "[[export]]\npath = 'DIR/a.img'\n", `line 1: export: no name; "" is the one`},
		{"name", "[[export]]\nname = \"a\\u0000\"\npath = 'DIR/a.img'\n", `line 1: export: name "a\x00": want at most 4096 bytes`},
		{"long name", "[[export]]\nname = '" + strings.Repeat("a", 4097) + "'\npath = 'DIR/a.img'\n", "want at most 4096 bytes"},
		{"description", a + "description = \"\\u0007\"\n", "line 1: export: description: want at most"},
		{"no path", "\n[[export]]\nname = 'a'\n", `line 2: export: "a" has no path`},
		{"relative path", "[[export]]\nname = 'a'\npath = 'a.img'\n", `line 1: export: path: want a path that begins with a slash, got "a.img"`},
		{"no such file", "[[export]]\nname = 'a'\npath = 'DIR/c.img'\n", "line 1: export: stat " + dir + "/c.img: no such file or directory"},
		{"folder", "[[export]]\nname = 'a'\npath = 'DIR'\n", "neither a block device nor a regular file"},
		{"same name", a + "[[export]]\nname = 'a'\npath = 'DIR/b.img'\n", `line 4: export: name "a" is there twice`},
		{"same file", a + "read_only = false\n[[export]] # again\nname = 'b'\npath = 'DIR/a.img'\nread_only = false\n",
			`line 5: export: "a" and "b" are the same file or device, and both writable`},
		{"same inode", a + "read_only = false\n[[export]]\nname = 'b'\npath = 'DIR/hard.img'\nread_only = false\n",
			`line 5: export: "a" and "b" are the same file or device, and both writable`},
		{"no address", "listen = []\n" + a, "line 1: listen: no address"},
		{"address", "\nlisten = ['localhost']\n" + a, `line 2: listen: "localhost" is neither host:port`},
		{"same address", "listen = [':1', ':1']\n" + a, `line 1: listen: ":1" is there twice`},
		{"relative certificate", "certfile = 'c.pem'\n" + a, `line 1: certfile: want a path that begins with a slash, got "c.pem"`},
		{"issuers without TLS", "cafile = '/c.pem'\n" + a, "line 1: cafile: needs certfile"},
		{"all of them", "listen = []\n[[export]]\n[[export]]\nname = 'b'\n", `listen: no address; line 2: export: no name`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := settingsIn(t, dir, tt.text)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), dir+"/exports.toml: ") {
				t.Errorf("got %v, want %s", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("got %q, want it in one line", err)
			}
		})
	}
}

// TestServeSettingsLoop: a loop device and its file are the same storage.
func TestServeSettingsLoop(t *testing.T) {
	file, device := fileID{1, 2}, fileID{3, 0}
	onFile := storage{own: file}
	for _, tt := range []struct {
		a, b storage
		want bool
	}{
		{onFile, onFile, true},
		{storage{own: device, behind: file}, onFile, true},
		{onFile, storage{own: device, behind: file}, true},
		{storage{own: device, behind: file}, storage{own: fileID{4, 0}, behind: file}, false}, // may be parts
		{onFile, storage{own: fileID{1, 3}}, false},
	} {
		if got := tt.a.same(tt.b); got != tt.want {
			t.Errorf("%+v and %+v: got %t", tt.a, tt.b, got)
		}
	}
}

// TestServeSeveral: LIST has all exports with their descriptions, and each is its own file.
func TestServeSeveral(t *testing.T) {
	dir := serveFolder(t)
	path := filepath.Join(dir, "exports.toml")
	text := strings.ReplaceAll(`
listen = ["127.0.0.1:0"]
[[export]]
name = "a"
path = "DIR/a.img"
read_only = false
description = "the first"
[[export]]
name = "b"
path = "DIR/b.img"
description = "the second"
`, "DIR", dir)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s := startServe(t, "--config", path)
	got := succeed(t, "list", "nbd://"+s.addr)
	for _, want := range []string{"a", "the first", "b", "the second"} {
		if !strings.Contains(got, want) {
			t.Errorf("list: got %q", got)
		}
	}
	if got := succeed(t, "info", "nbd://"+s.addr+"/b"); !strings.Contains(got, "read-only") || !strings.Contains(got, "the second") {
		t.Errorf("info of b: got %q", got)
	}
	src := content(512)
	succeed(t, "copy", writeFile(t, "src", src), "nbd://"+s.addr+"/a")
	sameBytes(t, "a", readFile(t, filepath.Join(dir, "a.img")), src)
	sameBytes(t, "b", readFile(t, filepath.Join(dir, "b.img")), make([]byte, 512))
	fail(t, exitFailed, []string{"no such export"}, "size", "nbd://"+s.addr)
}

// TestServeHelpFile: the file in the help, and so in the man page, is accepted.
func TestServeHelpFile(t *testing.T) {
	dir := serveFolder(t)
	_, rest, _ := strings.Cut(newServeCommand().Long, "  listen = ")
	text, _, _ := strings.Cut("listen = "+rest, "\n\nNo two exports")
	got, err := settingsIn(t, dir, strings.ReplaceAll(text, "/srv/disk.img", "DIR/a.img"))
	if err != nil {
		t.Fatal(err)
	}
	if len(got.exports) != 1 || !got.exports[0].writable || got.cafile == "" || len(got.listen) != 2 {
		t.Errorf("got %+v", got)
	}
}

// TestServeExampleFile: the file in docs/examples is accepted.
func TestServeExampleFile(t *testing.T) {
	dir := serveFolder(t)
	page := string(readFile(t, "../../docs/examples/nbd-tool-serve.md"))
	_, rest, _ := strings.Cut(page, "```toml\n")
	text, _, _ := strings.Cut(rest, "```")
	text = strings.NewReplacer("/srv/shop.img", "DIR/a.img", "/srv/backup.img", "DIR/b.img").Replace(text)
	if got, err := settingsIn(t, dir, text); err != nil || len(got.exports) != 2 {
		t.Errorf("got %+v, %v", got, err)
	}
}
