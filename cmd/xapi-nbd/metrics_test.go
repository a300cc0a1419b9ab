package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"xapi-nbd/nbd/wire"
	"xapi-nbd/xapi/xapitest"
)

// scrape returns the metrics at an address of the setting metrics.
func scrape(t *testing.T, addr string) string {
	t.Helper()
	network := "tcp"
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		network, addr = "unix", path
	}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, addr)
	}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://localhost/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("got %s, %v", resp.Status, err)
	}
	return string(body)
}

// waitMetrics waits until the metrics contain all lines, and returns them: bytes are counted
// after the client has received them.
func waitMetrics(t *testing.T, addr string, lines ...string) (got string) {
	t.Helper()
	for i, line := range lines {
		lines[i] = "\n" + line + "\n"
	}
	eventually(t, func() string {
		got = scrape(t, addr)
		return lacking("\n"+got, lines)
	})
	return got
}

func TestMetrics(t *testing.T) {
	for _, where := range []string{"tcp", "unix"} {
		t.Run(where, func(t *testing.T) {
			w := newWorld(t, xapitest.Config{})
			vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
			addr := "127.0.0.1:0"
			if where == "unix" {
				addr = "unix:" + w.dir + "/metrics"
			}
			p := w.start("--config=" + w.file("metrics.toml", `metrics = "`+addr+`"`))
			if where == "tcp" {
				addr = regexp.MustCompile(`metrics on ([0-9.:]+)`).FindStringSubmatch(p.waitLine("metrics on "))[1]
			}
			w.follow(t, p, vdi, addr)
		})
	}
}

// TestMetricsAddressInUse: while the metrics' address is in use, disks are served.
func TestMetricsAddressInUse(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	addr := l.Addr().String()
	p := w.start("--config=" + w.file("metrics.toml", `metrics = "`+addr+`"`))
	w.wantReply(t, p, vdi, false, 0, "")
	if got := w.report().Retries; len(got) != 1 || got[0].Action != "answer Prometheus at "+addr || !strings.Contains(got[0].LastError, "in use") {
		t.Errorf("retries in the status: got %+v", got)
	}
	l.Close()
	p.waitLine("metrics on " + addr)
	waitMetrics(t, addr, `xapi_nbd_state{state="serving"} 1`)
}

// follow compares the metrics with the events of a transfer.
func (w *world) follow(t *testing.T, p *process, vdi, addr string) {
	conn, err := w.open(p, w.export(vdi), false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.ReadAt(make([]byte, 300<<10), 0); err != nil {
		t.Fatal(err)
	}
	client, err := w.dial(p, false)
	if err != nil {
		t.Fatal(err)
	}
	w.wantRefused(t, client, w.host.ExportName(vdi, w.deadSession()), wire.RepErrPolicy, "session")
	got := waitMetrics(t, addr,
		`xapi_nbd_connections{phase="serving"} 1`, `xapi_nbd_connections{phase="negotiating"} 1`,
		`xapi_nbd_bytes_total 307200`, `xapi_nbd_attachments{stage="attached"} 1`, `xapi_nbd_journal_entries 1`,
		`xapi_nbd_refusals_total{reason="session"} 1`, `xapi_nbd_refused_options_total{reply="NBD_REP_ERR_POLICY"} 1`,
		`xapi_nbd_allocation_known_total 0`, `xapi_nbd_allocation_unknown_total{reason="not_vhd"} 1`, `xapi_nbd_allocation_unknown_total{reason="timeout"} 0`,
		`xapi_nbd_plug_seconds_count{operation="plug"} 1`, `xapi_nbd_xapi_calls_total{method="VBD.plug",result="ok"} 1`,
		`xapi_nbd_xapi_up 1`, `xapi_nbd_state{state="serving"} 1`, `xapi_nbd_max_vbds 16`,
		`xapi_nbd_rate_limit_bytes_per_second{scope="all"} 0`, `xapi_nbd_vbds_left_behind 0`,
		`xapi_nbd_refused_requests_total 0`, `xapi_nbd_failed_requests_total 0`,
		`xapi_nbd_inflight_bytes 0`, `xapi_nbd_inflight_requests 0`,
		`xapi_nbd_device_read_seconds_bucket{le="60"} 1`, `xapi_nbd_device_read_seconds_count 1`, `xapi_nbd_device_read_stall_seconds 0`,
		// Counters of events that have not happened exist too.
		`xapi_nbd_errors_total{errno="NBD_EIO"} 0`, `xapi_nbd_refused_options_total{reply="NBD_REP_ERR_TLS_REQD"} 0`,
		`xapi_nbd_refusals_total{reason="tls_required"} 0`, `xapi_nbd_refusals_total{reason="vbd_limit"} 0`,
		`xapi_nbd_transfers_ended_total{reason="disconnect"} 0`, `xapi_nbd_transfers_ended_total{reason="device"} 0`,
		`xapi_nbd_build_info{version="unknown"} 1`,
		`xapi_nbd_plug_seconds_count{operation="unplug"} 0`, `xapi_nbd_xapi_calls_total{method="VBD.unplug",result="ok"} 0`,
		`xapi_nbd_xapi_calls_total{method="VBD.plug",result="unreachable"} 0`, `xapi_nbd_xapi_call_seconds_count{method="VBD.destroy"} 0`,
		`xapi_nbd_xapi_calls_total{method="network.get_all",result="error"} 0`, `xapi_nbd_attachments{stage="lingering"} 0`,
	)
	w.WantNoSecrets("the metrics", got)
	if !strings.Contains(got, "\nxapi_nbd_certificate_expiry_timestamp_seconds 1.") {
		t.Errorf("the certificate's expiry is missing:\n%s", got)
	}
	if err := client.Abort(); err != nil {
		t.Error(err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	w.waitClean(p)
	waitMetrics(t, addr,
		`xapi_nbd_connections{phase="serving"} 0`, `xapi_nbd_bytes_total 307200`, `xapi_nbd_journal_entries 0`,
		`xapi_nbd_plug_seconds_count{operation="unplug"} 1`, `xapi_nbd_transfers_ended_total{reason="disconnect"} 1`,
	)
	w.host.Stop()
	if code, _, _ := w.cleanup(); code == 0 { // has the service ask xapi
		t.Error("cleaned up without xapi")
	}
	waitMetrics(t, addr, `xapi_nbd_xapi_up 0`)
	if err := w.host.Resume(); err != nil {
		t.Fatal(err)
	}
}

// TestMetricsKnowCalls: there are series for the calls of a transfer before the first call.
func TestMetricsKnowCalls(t *testing.T) {
	w := newWorld(t, xapitest.Config{})
	vdi := w.addVDI(random(1, 1<<20), xapitest.VDISpec{})
	p, addr := w.startWithMetrics()
	before := scrape(t, addr)
	w.wantReply(t, p, vdi, false, 0, "")
	w.waitClean(p)
	for _, call := range w.host.Calls() {
		if !strings.Contains(before, `xapi_nbd_xapi_calls_total{method="`+call.Method+`",result="ok"}`) {
			t.Errorf("%s has no series from the start", call.Method)
		}
	}
}
