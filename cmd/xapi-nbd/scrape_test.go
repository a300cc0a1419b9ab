package main

import (
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"xapi-nbd/internal/testcert"
	"xapi-nbd/test/requires"
	"xapi-nbd/xapi/xapitest"
)

// startWithMetrics starts a service with metrics, and returns it and their address.
func (w *world) startWithMetrics() (p *process, addr string) {
	p = w.start("--config=" + w.file("metrics.toml", `metrics = "127.0.0.1:0"`))
	return p, regexp.MustCompile(`metrics on ([0-9.:]+)`).FindStringSubmatch(p.waitLine("metrics on "))[1]
}

// TestOperationsNamesEveryLabel: the table of REFERENCE has every metric's labels and their
// values, and a service that has just started has a series for each of them.
func TestOperationsNamesEveryLabel(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	_, addr := w.startWithMetrics()
	got := waitMetrics(t, addr, `xapi_nbd_state{state="serving"} 1`)
	rows := make(map[string][]string) // the cells of the row about a metric
	for _, row := range regexp.MustCompile("(?m)^\\| `(xapi_nbd_\\w+)` \\|(.*)\\|$").FindAllStringSubmatch(reference(t), -1) {
		rows[row[1]] = strings.SplitN(row[2], "|", 3)
	}
	quoted := regexp.MustCompile("`([^`]+)`")
	seen := make(map[string]map[string]bool) // by metric: labels and values that there are
	for _, series := range regexp.MustCompile(`(?m)^(xapi_nbd_\w+?)(?:_bucket|_sum|_count)?(?:\{(.*)\})? \S+$`).FindAllStringSubmatch(got, -1) {
		name := series[1]
		row := rows[name]
		if row == nil {
			t.Errorf("there is no row about %s", name)
			continue
		}
		if seen[name] == nil {
			seen[name] = make(map[string]bool)
		}
		for _, label := range regexp.MustCompile(`(\w+)="([^"]*)"`).FindAllStringSubmatch(series[2], -1) {
			if label[1] == "le" {
				continue
			}
			seen[name][label[1]] = true
			if listed := strings.Contains(row[1], "`"+label[1]+"`: `"); listed {
				seen[name][label[2]] = true
			}
		}
	}
	for name, row := range rows {
		if seen[name] == nil {
			t.Errorf("%s is in the table and not in the metrics", name)
			continue
		}
		for _, word := range quoted.FindAllStringSubmatch(row[1], -1) {
			if name != "xapi_nbd_refusals_total" && !seen[name][word[1]] {
				t.Errorf("%s: the table tells of %q, and there is no such series", name, word[1])
			}
			delete(seen[name], word[1])
		}
		delete(seen[name], "reason")
		for word := range seen[name] {
			t.Errorf("%s: the table does not tell of %q", name, word)
		}
		if kind := strings.TrimSpace(row[0]); !strings.Contains(got, "\n# TYPE "+name+" "+kind+"\n") {
			t.Errorf("%s is no %s", name, kind)
		}
	}
}

// recipe returns a code block of OPERATIONS, with replacements for the test.
func recipe(t *testing.T, name string, replacements ...string) string {
	t.Helper()
	_, text, found := strings.Cut(operations(t), "<!-- recipe: "+name+" -->\n\n")
	if !found {
		t.Fatalf("there is no recipe %s", name)
	}
	var block strings.Builder
	for line := range strings.Lines(text) {
		line, indented := strings.CutPrefix(line, "    ")
		if !indented {
			break
		}
		block.WriteString(line)
	}
	for i := 0; i < len(replacements); i += 2 {
		if !strings.Contains(block.String(), replacements[i]) {
			t.Fatalf("recipe %s lacks %q", name, replacements[i])
		}
	}
	return strings.NewReplacer(replacements...).Replace(block.String())
}

// TestTextfileRecipe: the recipe for node_exporter writes all metrics of the service and no
// others, promtool accepts the file, and it does not change if the service does not answer.
func TestTextfileRecipe(t *testing.T) {
	requires.Tool(t, "curl")
	promtool := requires.Tool(t, "promtool")
	w := newWorld(t, xapitest.Config{})
	p, addr := w.startWithMetrics()
	scraped := waitMetrics(t, addr, `xapi_nbd_state{state="serving"} 1`)
	dir := t.TempDir()
	script := w.file("textfile", recipe(t, "textfile", "127.0.0.1:9810", addr, "/var/lib/node_exporter ", dir+" "))
	run := func() (string, error) {
		out, err := exec.CommandContext(t.Context(), "/bin/sh", script).CombinedOutput()
		return string(out), err
	}
	if out, err := run(); err != nil || out != "" {
		t.Fatalf("got %v: %s", err, out)
	}
	file := filepath.Join(dir, "xapi-nbd.prom")
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("got %v, %v: node_exporter may not read it", info.Mode(), err)
	}
	lines := regexp.MustCompile(`(?m)^(?:# \w+ )?xapi_nbd_[\w]+(?:\{.*?\})?`)
	want := lines.FindAllString(scraped, -1)
	if got := lines.FindAllString(string(content), -1); !slices.Equal(got, want) {
		t.Errorf("the file has %d lines about %d of ours", len(got), len(want))
	}
	if strings.Count(string(content), "\n") != len(want) {
		t.Errorf("other metrics are in the file:\n%s", content)
	}
	check := exec.CommandContext(t.Context(), promtool, "check", "metrics")
	check.Stdin = strings.NewReader(string(content))
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("promtool: %v\n%s", err, out)
	}
	if _, err := run(); err != nil {
		t.Errorf("a second time: %v", err)
	}
	p.stop(time.Minute)
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := run(); err == nil {
		t.Error("no error without the service")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("got %v, %v, want the one file", entries, err)
	}
	if after, err := os.ReadFile(file); err != nil || string(after) != string(before) {
		t.Errorf("the file is not as it was: %v", err)
	}
}

// TestTextfileUnits: systemd accepts the units of the recipe.
func TestTextfileUnits(t *testing.T) {
	analyze := requires.Tool(t, "systemd-analyze")
	dir := t.TempDir()
	for _, name := range []string{"xapi-nbd-textfile.service", "xapi-nbd-textfile.timer"} {
		text := recipe(t, name)
		text = strings.ReplaceAll(text, "/usr/local/sbin/xapi-nbd-textfile", "/bin/true")
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.CommandContext(t.Context(), analyze, "verify", "--recursive-errors=no", "--man=no", filepath.Join(dir, "xapi-nbd-textfile.timer"),
		filepath.Join(dir, "xapi-nbd-textfile.service")).CombinedOutput()
	if err != nil || strings.Contains(string(out), "xapi-nbd-textfile") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestStunnelRecipe: stunnel answers only clients with a certificate.
func TestStunnelRecipe(t *testing.T) {
	stunnel := requires.Tool(t, "stunnel4")
	w := newWorld(t, xapitest.Config{})
	_, addr := w.startWithMetrics()
	waitMetrics(t, addr, `xapi_nbd_state{state="serving"} 1`)
	server, client := testcert.SelfSigned("server"), clientCert()
	serverFile := w.dir + "/stunnel.pem"
	if err := server.WriteServerFile(serverFile); err != nil {
		t.Fatal(err)
	}
	clientFile := w.file("prometheus-ca.pem", string(client.PEM()))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	outside := l.Addr().String()
	l.Close()
	config := w.file("stunnel.conf", recipe(t, "stunnel", "accept = 9811", "accept = "+outside, "127.0.0.1:9810", addr,
		"/etc/xensource/xapi-ssl.pem", serverFile, "/etc/stunnel/prometheus-ca.pem", clientFile))
	cmd := exec.CommandContext(t.Context(), stunnel, config)
	var log strings.Builder
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(log.String())
		}
	})
	get := func(certificates ...*testcert.Cert) (string, error) {
		cfg := server.ClientConfig("server")
		for _, c := range certificates {
			cfg.Certificates = append(cfg.Certificates, c.ServerConfig().Certificates...)
		}
		c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: cfg}}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+outside+"/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}
	eventually(t, func() string {
		body, err := get(client)
		if err != nil {
			return err.Error()
		}
		return lacking(body, []string{"\nxapi_nbd_state{state=\"serving\"} 1\n"})
	})
	if body, err := get(); err == nil {
		t.Errorf("without a certificate:\n%s", body)
	}
	if body, err := get(clientCert()); err == nil {
		t.Errorf("with a certificate of another authority:\n%s", body)
	}
}

// clientCert returns a self-signed certificate for a client.
func clientCert() *testcert.Cert {
	template := testcert.Server("prometheus")
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return testcert.Sign(template, nil, nil)
}
