package check

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/pflag"

	"xapi-nbd/cmd/internal/buildinfo"
	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
)

// The levels of findings.
const (
	LevelOK      = "ok"
	LevelWarning = "warning" // clients are served, but slower or not for long
	LevelProblem = "problem" // clients are refused
)

// Finding is one result of a check. It holds no secrets.
type Finding struct {
	Level   string `json:"level"`
	Subject string `json:"subject"` // the part of the host that was checked, such as "certificate"
	Detail  string `json:"detail"`
	Remedy  string `json:"remedy,omitempty"` // one or more lines
}

// Report has the findings, in the order of the checks.
type Report struct {
	Version  string    `json:"version"`
	Problems int       `json:"problems"`
	Warnings int       `json:"warnings"`
	Findings []Finding `json:"findings"`
}

// checker is the state of Run. Each of its checks is independent, so that one problem does
// not hide the next.
type checker struct {
	facts  Facts
	report Report

	// Results of earlier checks.
	cfg     config.Config
	service int           // id of the running service's process, 0 without one
	session *xapi.Session // nil without xapi
	host    vdi.Host
	usable  bool // there is a certificate to serve
}

// Run checks everything that the service needs on this host. flags and configFile are
// those of the service. It changes nothing, and waits up to callTimeout for each call to
// xapi.
func Run(ctx context.Context, f Facts, flags *pflag.FlagSet, configFile string) *Report {
	c := &checker{facts: f, report: Report{Version: buildinfo.Version()}}
	if c.user() {
		c.run(ctx, flags, configFile)
	}
	return &c.report
}

func (c *checker) run(ctx context.Context, flags *pflag.FlagSet, configFile string) {
	c.configuration(flags, configFile)
	c.running(ctx)
	c.stateFolder()
	c.inventory()
	c.certificate()
	client := xapi.New(xapi.Config{Socket: c.cfg.XapiSocket, CallTimeout: callTimeout})
	defer client.Close()
	c.xapi(ctx, client)
	c.leftovers(ctx)
	c.logout(ctx)
	c.deviceFolder()
	c.writing()
	c.addresses(ctx)
	c.limits()
	c.kernel()
}

func (c *checker) ok(subject, format string, args ...any) {
	c.report.Findings = append(c.report.Findings, Finding{LevelOK, subject, fmt.Sprintf(format, args...), ""})
}

func (c *checker) warning(subject, remedy, format string, args ...any) {
	c.report.Warnings++
	c.report.Findings = append(c.report.Findings, Finding{LevelWarning, subject, fmt.Sprintf(format, args...), remedy})
}

func (c *checker) problem(subject, remedy, format string, args ...any) {
	c.report.Problems++
	c.report.Findings = append(c.report.Findings, Finding{LevelProblem, subject, fmt.Sprintf(format, args...), remedy})
}

// callTimeout bounds each call to xapi: one that takes longer is reported as a problem.
const callTimeout = 10 * time.Second
