package service

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"xapi-nbd/cmd/internal/buildinfo"
	"xapi-nbd/cmd/internal/listenaddr"
	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/vdi"
)

// metrics are the statistics for Prometheus. The methods of a nil *metrics do nothing.
type metrics struct {
	addr     string
	registry *prometheus.Registry

	calls    *prometheus.CounterVec   // of xapi, by method and result
	callTime *prometheus.HistogramVec // the same, by method
	plugTime *prometheus.HistogramVec // by operation
}

// newMetrics makes the metrics of s; serve answers on addr.
func newMetrics(s *Service, addr string) *metrics {
	if addr == config.MetricsOff {
		return nil
	}
	m := &metrics{
		addr: addr, registry: prometheus.NewRegistry(),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "xapi_nbd_xapi_calls_total", Help: "Calls to xapi, by method and result.",
		}, []string{"method", "result"}),
		callTime: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "xapi_nbd_xapi_call_seconds", Help: "How long calls to xapi took.",
			Buckets: []float64{0.001, 0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60},
		}, []string{"method"}),
		plugTime: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "xapi_nbd_plug_seconds", Help: "How long plugging and unplugging VBDs took, where it succeeded.",
			Buckets: []float64{0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 300, 1800},
		}, []string{"operation"}),
	}
	m.registry.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		m.calls, m.callTime, m.plugTime, &serviceCollector{s},
	)
	m.addZeroes()
	return m
}

// The label values of the metrics about calls to xapi.
var (
	knownResults    = []string{callOK, callError, callAnswer, callFailure}
	plugOperations  = map[string]string{"VBD.plug": "plug", "VBD.unplug": "unplug"}
	knownOperations = []string{"plug", "unplug"}
	// knownMethods are all methods of xapi that package xapi calls.
	knownMethods = []string{
		"session.login_with_password", "session.get_uuid", "session.get_record", "session.logout",
		"network.get_all_records", "network.get_all", "network.get_record", "host.get_by_uuid", "host.get_control_domain",
		"VM.get_by_uuid", "VM.get_name_label", "VM.get_VBDs", "SR.get_record", "VDI.get_by_uuid", "VDI.get_record", "VDI.get_VBDs", "VDI.list_changed_blocks",
		"VBD.create", "VBD.get_uuid", "VBD.get_by_uuid", "VBD.get_VM", "VBD.get_record", "VBD.get_all_records_where",
		"VBD.plug", "VBD.unplug", "VBD.destroy",
	}
)

// addZeroes makes the series of calls that have not been made yet, so that Prometheus sees
// an increase at the first one.
func (m *metrics) addZeroes() {
	for _, method := range knownMethods {
		m.callTime.WithLabelValues(method)
		for _, result := range knownResults {
			m.calls.WithLabelValues(method, result)
		}
	}
	for _, operation := range knownOperations {
		m.plugTime.WithLabelValues(operation)
	}
}

// called counts a call to xapi.
func (m *metrics) called(method string, took time.Duration, result string) {
	if m == nil {
		return
	}
	m.calls.WithLabelValues(method, result).Inc()
	m.callTime.WithLabelValues(method).Observe(took.Seconds())
	if operation, ok := plugOperations[method]; ok && result == callOK {
		m.plugTime.WithLabelValues(operation).Observe(took.Seconds())
	}
}

// serve serves the metrics until ctx ends. Failures are logged and tried again; the
// service works without metrics meanwhile.
func (m *metrics) serve(ctx context.Context, log *slog.Logger, r *retries) {
	if m == nil {
		return
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	open := func(ctx context.Context) (net.Listener, error) { return listenaddr.Listen(ctx, m.addr) }
	keepServing(ctx, r, "answer Prometheus at "+m.addr, open, func(l net.Listener) error {
		log.Info("metrics on " + l.Addr().String())
		return server.Serve(l)
	})
}

// serviceCollector reads the counters of the service at each scrape.
type serviceCollector struct{ s *Service }

// describe makes the description of a metric of ours.
func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("xapi_nbd_"+name, help, labels, nil)
}

var (
	descState       = describe("state", "1 for the state that the service is in.", "state")
	descConnections = describe("connections", "Connections, by phase.", "phase")
	descAccepted    = describe("connections_total", "Connections that were allowed to negotiate.")
	descRequests    = describe("requests_total", "Requests of clients.")
	descFailed      = describe("failed_requests_total", "Requests that the device failed.")
	descRejected    = describe("refused_requests_total", "Requests that were refused without asking the device: invalid, or not permitted.")
	descBytes       = describe("bytes_total", "Bytes of disks that were read for clients.")
	descWritten     = describe("written_bytes_total", "Bytes of disks that were written for clients.")
	descErrors      = describe("errors_total", "Requests that were answered with an error, by the error.", "errno")
	descRefusals    = describe("refusals_total", "Clients that were refused, by reason.", "reason")
	descOptions     = describe("refused_options_total", "Options of the negotiation that were refused, by the reply.", "reply")
	descInflight    = describe("inflight_requests", "Requests that are being served.")
	descBudget      = describe("inflight_bytes", "Bytes that these may have in memory.")
	descReads       = describe("device_read_seconds", "How long devices took for reads, those from the page cache and those that failed too.")
	descReadStall   = describe("device_read_stall_seconds", "The longest time for which reads of one connection have been waiting for the device and none of them ended.")
	descAttachments = describe("attachments", "VDIs that are attached or about to be, by stage.", "stage")
	descJournal     = describe("journal_entries", "VBDs in the journal, in use or left behind.")
	descLeft        = describe("vbds_left_behind", "VBDs that are not in use and still have to be removed.")
	descXapi        = describe("xapi_up", "Whether xapi answered the last call.")
	descKnown       = describe("allocation_known_total", "Attachments whose blocks with data are known.")
	descUnknown     = describe("allocation_unknown_total", "Attachments all of whose blocks count as data, by reason.", "reason")
	descRetries     = describe("retries_pending", "Things that the service cannot do yet and tries again.")
	descLogDropped  = describe("log_lines_dropped_total", "Log lines that were not taken in time, or could not be written.")
	descEnds        = describe("transfers_ended_total", "Transfers that have ended, by reason.", "reason")
	descBuild       = describe("build_info", "1, with the version of the program.", "version")
	descExpiry      = describe("certificate_expiry_timestamp_seconds", "When the certificate that is served ends, in seconds of the epoch; not there without a certificate.")
	descMaxConns    = describe("max_connections", "The setting max_connections.")
	descMaxVBDs     = describe("max_vbds", "The setting max_vbds.")
	descMaxInflight = describe("max_inflight_bytes", "The setting max_inflight_bytes.")
	descRateLimit   = describe("rate_limit_bytes_per_second", "The settings rate_limit (scope all) and rate_limit_vdi (scope vdi); 0 is no limit.", "scope")
)

// The label values of the counters of errors and replies. Each counter exists from the
// start, so that Prometheus sees its first increase.
var (
	knownErrors = []wire.Errno{
		wire.EPERM, wire.EIO, wire.ENOMEM, wire.EINVAL, wire.ENOSPC, wire.EOVERFLOW, wire.ENOTSUP, wire.ESHUTDOWN,
	}
	knownReplies = []wire.OptionReply{
		wire.RepErrUnsup, wire.RepErrPolicy, wire.RepErrInvalid, wire.RepErrPlatform, wire.RepErrTLSReqd, wire.RepErrUnknown,
		wire.RepErrShutdown, wire.RepErrBlockSizeReqd, wire.RepErrTooBig, wire.RepErrExtHeaderReqd,
	}
)

// withZeroes adds the kinds that have not occurred.
func withZeroes[K fmt.Stringer](counts map[string]int64, kinds []K) map[string]int64 {
	for _, kind := range kinds {
		counts[kind.String()] += 0
	}
	return counts
}

// Describe implements prometheus.Collector.
func (c *serviceCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descState, descConnections, descAccepted, descRequests, descBytes, descWritten, descErrors, descRefusals, descOptions,
		descInflight, descBudget, descReads, descReadStall, descAttachments, descJournal, descXapi, descEnds, descBuild, descExpiry,
		descFailed, descRejected, descLeft, descMaxConns, descMaxVBDs, descMaxInflight, descRateLimit,
		descRetries, descLogDropped, descKnown, descUnknown,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *serviceCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	for _, state := range []string{control.StateLocking, control.StateWaiting, control.StateServing, control.StateDraining} {
		gauge(descState, truth(state == c.s.state()), strings.ReplaceAll(state, " ", "_"))
	}
	c.connections(gauge)
	totals := c.s.server.Totals()
	counter(descAccepted, totals.Conns)
	counter(descRequests, totals.Requests)
	counter(descFailed, totals.Failed)
	counter(descRejected, totals.Refused)
	counter(descBytes, totals.Bytes-totals.Written)
	counter(descWritten, totals.Written)
	ch <- readLatency(totals.ReadLatency)
	for errno, n := range withZeroes(totals.Errors, knownErrors) {
		counter(descErrors, n, errno)
	}
	for reply, n := range withZeroes(totals.OptionErrors, knownReplies) {
		counter(descOptions, n, reply)
	}
	for reason, n := range totals.Ends {
		counter(descEnds, n, reason)
	}
	for reason, n := range c.s.refusedByReason() {
		counter(descRefusals, n, reason)
	}
	c.vbds(gauge)
	gauge(descRetries, float64(len(c.s.retries.report())))
	counter(descLogDropped, c.s.droppedLines())
	for reason, n := range c.s.disks.BlocksCounts() {
		if reason == "" {
			counter(descKnown, n)
		} else {
			counter(descUnknown, n, reason)
		}
	}
	gauge(descXapi, truth(c.s.health.report().Reachable))
	gauge(descBuild, 1, buildinfo.Version())
	if expiry, ok := c.s.policy.certificateExpiry(); ok {
		gauge(descExpiry, float64(expiry.Unix()))
	}
	cfg := c.s.settings.Load()
	gauge(descMaxConns, float64(cfg.MaxConnections))
	gauge(descMaxVBDs, float64(cfg.MaxVBDs))
	gauge(descMaxInflight, float64(cfg.MaxInflightBytes))
	gauge(descRateLimit, float64(cfg.RateLimit), "all")
	gauge(descRateLimit, float64(cfg.RateLimitVDI), "vdi")
}

// vbds reports the attachments and the journal. It reads the journal first, so that a VBD
// that is attached in between does not count as left behind.
func (c *serviceCollector) vbds(gauge func(*prometheus.Desc, float64, ...string)) {
	journal, err := c.s.disks.Journal()
	attachments := c.s.disks.Status()
	stages := make(map[string]float64)
	for _, stage := range vdi.Stages() {
		stages[stage] = 0
	}
	for _, a := range attachments {
		stages[a.Stage]++
	}
	for stage, n := range stages {
		gauge(descAttachments, n, stage)
	}
	if err == nil { // otherwise the number is not known
		gauge(descJournal, float64(len(journal)))
		gauge(descLeft, float64(leftBehind(journal, attachments, c.s.disks.Leftovers())))
	}
}

// leftBehind counts the VBDs that no attachment uses: those of the journal, and
// those that recovery knows of without it.
func leftBehind(journal []string, attachments []vdi.Status, leftovers []vdi.Leftover) (n int) {
	for _, uuid := range journal {
		if !slices.ContainsFunc(attachments, func(a vdi.Status) bool { return a.VBD == uuid }) {
			n++
		}
	}
	for _, l := range leftovers {
		if !slices.Contains(journal, l.VBD) {
			n++
		}
	}
	return n
}

func (c *serviceCollector) connections(gauge func(*prometheus.Desc, float64, ...string)) {
	negotiating, serving, requests, bytes, stall := 0, 0, 0, int64(0), time.Duration(0)
	for _, conn := range c.s.server.Conns() {
		requests += conn.InFlight
		bytes += conn.InFlightBytes
		stall = max(stall, conn.ReadStall)
		if conn.Serving {
			serving++
		} else {
			negotiating++
		}
	}
	gauge(descConnections, float64(negotiating), "negotiating")
	gauge(descConnections, float64(serving), "serving")
	gauge(descInflight, float64(requests))
	gauge(descBudget, float64(bytes))
	gauge(descReadStall, stall.Seconds())
}

// readLatency reports how long devices took for reads.
func readLatency(l nbd.ReadLatency) prometheus.Metric {
	var n uint64 // of this bucket and all before it
	buckets := make(map[float64]uint64)
	for i, bound := range nbd.ReadLatencyBounds() {
		n += uint64(l.Counts[i])
		buckets[bound.Seconds()] = n
	}
	n += uint64(l.Counts[len(buckets)]) // in +Inf, which has no entry
	return prometheus.MustNewConstHistogram(descReads, n, l.Sum.Seconds(), buckets)
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
