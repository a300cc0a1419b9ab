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
	LevelWarning = "warning" // it works, but not as well as it could, or not for long
	LevelProblem = "problem" // a client will be refused
)

// Finding is the result of one look. It holds no secrets.
type Finding struct {
	Level  string `json:"level"`
	What   string `json:"what"`
	Detail string `json:"detail"`
	Remedy string `json:"remedy,omitempty"` // one or more lines
}

// Report has the findings, in the order of the looks.
type Report struct {
	Version  string    `json:"version"`
	Problems int       `json:"problems"`
	Warnings int       `json:"warnings"`
	Findings []Finding `json:"findings"`
}

// checker is the state of Run. Each look is independent, so that one problem does not hide
// the next.
type checker struct {
	facts  Facts
	report Report

	// Results of earlier looks.
	cfg     config.Config
	service int           // id of the running service's process, 0 without one
	session *xapi.Session // nil without xapi
	host    vdi.Host
	usable  bool // there is a certificate to serve
}

// Run looks at everything that the service needs on this host. flags and configFile are
// those of the service. It changes nothing, and takes up to some seconds for each question
// that is not answered.
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
	c.addresses(ctx)
	c.limits()
	c.kernel()
}

func (c *checker) ok(what, format string, args ...any) {
	c.report.Findings = append(c.report.Findings, Finding{LevelOK, what, fmt.Sprintf(format, args...), ""})
}

func (c *checker) warning(what, remedy, format string, args ...any) {
	c.report.Warnings++
	c.report.Findings = append(c.report.Findings, Finding{LevelWarning, what, fmt.Sprintf(format, args...), remedy})
}

func (c *checker) problem(what, remedy, format string, args ...any) {
	c.report.Problems++
	c.report.Findings = append(c.report.Findings, Finding{LevelProblem, what, fmt.Sprintf(format, args...), remedy})
}

// callTimeout bounds each call to xapi: one that takes longer is reported as a problem.
const callTimeout = 10 * time.Second
