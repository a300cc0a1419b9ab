package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spf13/pflag"
)

// load is Load for a command line and the text of a file.
func load(t *testing.T, file string, args ...string) (Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "xapi-nbd.toml")
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := Default()
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	BindFlags(flags, &cfg)
	flags.String("ciphersuites", "", "")
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	return Load(flags, path)
}

func TestConfigPrecedence(t *testing.T) {
	got, err := load(t, `
port = 1
max_vbds = 3
listen = ["127.0.0.1:1"]
idle_timeout = "2m"
max_inflight_bytes = "8 MiB"
`, "--max-vbds=4", "--listen=[::1]:2", "--listen=unix:/run/x", "--xapi-socket=/x")
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Port = 1
	want.MaxVBDs = 4
	want.Listen = []string{"[::1]:2", "unix:/run/x"}
	want.IdleTimeout = Duration(2 * time.Minute)
	want.MaxInflightBytes = 8 << 20
	want.XapiSocket = "/x"
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Config{})); diff != "" {
		t.Errorf("want -, got +\n%s", diff)
	}
}

func TestConfigErrors(t *testing.T) {
	tests := []struct {
		name, file string
		args       []string
		want       []string // all in the error
	}{
		{"unknown key", "port = 1\n\nprot = 2\n", nil, []string{"line 3", `"prot"`}},
		{"key in upper case", "port = 1\nTLS = \"off\"\n", nil, []string{`line 2: unknown key "TLS"; it is spelt "tls"`}},
		{"unknown key in a table", "port = 1\n[server]\nport = 2\n", nil, []string{"line 2", "server"}},
		{"syntax", "max_vbds = 1\nport = \n", nil, []string{"line 2: "}},
		{"wrong type", `port = "many"`, nil, []string{"line 1: port: "}},
		{"duration without a unit", "port = 1\nidle_timeout = 30\n", nil, []string{"line 2: idle_timeout: ", "unit"}},
		{"duration of nonsense", `idle_timeout = "soon"`, nil, []string{"idle_timeout", "soon"}},
		{"size of nonsense", `max_inflight_bytes = "64 MB"`, nil, []string{"max_inflight_bytes", "64 MB"}},
		{"negative size", `max_inflight_bytes = -1`, nil, []string{"max_inflight_bytes"}},
		{"port", "", []string{"--port=65536"}, []string{"port", "65536"}},
		{"tls", "", []string{"--tls=maybe"}, []string{"tls", "maybe"}},
		{"tls without a certificate", "", []string{"--tls=require"}, []string{"certfile"}},
		{"level", "", []string{"--log-level=loud"}, []string{"log_level", "loud"}},
		{"format", "", []string{"--log-format=xml"}, []string{"log_format", "xml"}},
		{"no connections", "", []string{"--max-connections=0"}, []string{"max_connections"}},
		{"no VBDs", "max_vbds = -1", nil, []string{"max_vbds"}},
		{"no time", `handshake_timeout = "0s"`, nil, []string{"handshake_timeout"}},
		{"no address", "", []string{"--listen=localhost"}, []string{"listen", "localhost"}},
		{"no path", "", []string{"--listen=unix:"}, []string{"listen"}},
		{"all of them", "max_vbds = 0\nmax_connections = 0", nil, []string{"max_vbds", "max_connections"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(t, tt.file, tt.args...)
			for _, want := range tt.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got error %v, want one with %q", err, want)
				}
			}
			// The library's own texts have several lines, and the log needs one.
			if err != nil && (strings.Contains(err.Error(), " toml:") || strings.Contains(err.Error(), "At line")) {
				t.Errorf("got %q, want it in one line", err)
			}
		})
	}
}

// TestInspectKeyInUpperCase: it is a mistake, and not the setting.
func TestInspectKeyInUpperCase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "xapi-nbd.toml")
	if err := os.WriteFile(path, []byte("Port = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, _, mistakes := Inspect(pflag.NewFlagSet("test", pflag.ContinueOnError), path)
	const want = `line 1: unknown key "Port"; it is spelt "port"`
	if cfg.Port == 1 || len(mistakes) != 1 || !strings.Contains(mistakes[0].Text, want) {
		t.Errorf("got port %d and mistakes %v, want the default and %s", cfg.Port, mistakes, want)
	}
}

// TestExampleFileIsTheDefaults: the example file has all settings with their defaults.
func TestExampleFileIsTheDefaults(t *testing.T) {
	text, err := os.ReadFile("../../../../packaging/xapi-nbd.toml")
	if err != nil {
		t.Fatal(err)
	}
	var active strings.Builder
	for line := range strings.Lines(string(text)) {
		setting := strings.TrimPrefix(line, "#")
		if name, _, ok := strings.Cut(setting, " = "); ok && !strings.ContainsAny(name, " #") {
			active.WriteString(setting)
		}
	}
	got, err := load(t, active.String(), "--listen=127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Listen = []string{"127.0.0.1:1"} // an example, not a default
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Config{}), cmpopts.IgnoreFields(Config{}, "XapiSocket", "Certfile")); diff != "" {
		t.Errorf("want -, got +\n%s\nfrom\n%s", diff, active.String())
	}
}

func TestMetricsAddr(t *testing.T) {
	for addr, fine := range map[string]bool{
		"off": true, "127.0.0.1:9100": true, "[::1]:0": true, "localhost:1": true, "unix:/run/x": true, "127.9.9.9:1": true,
		"": false, "on": false, "0.0.0.0:9100": false, ":9100": false, "192.0.2.1:9100": false, "[::]:1": false,
		"unix:": false, "example.com:1": false, "127.0.0.1": false,
	} {
		if err := checkMetricsAddr(addr); (err == nil) != fine {
			t.Errorf("%q: got %v", addr, err)
		}
	}
	if _, err := load(t, "port = 1\nmetrics = \"0.0.0.0:1\"\n"); err == nil || !strings.Contains(err.Error(), "line 2: metrics:") {
		t.Errorf("got %v, want the line", err)
	}
}
