package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"xapi-nbd/cmd/internal/buildinfo"
	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/xapi"
)

// exitProblems is what check ends with when something has to be done.
const exitProblems = 1

func newCheckCommand() *cobra.Command {
	flags := config.Default()
	var configFile string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say what is wrong with this host's set-up, and what to do about it",
		Long: `Look at everything that the service needs on this host and report all of it in
one go: settings, xapi, inventory, networks, certificate, state folder, device
folder, addresses, limits and kernel. Below what is not right stands what to do.

Takes the flags of the service. Without a certfile, in flags or file, the one
that the packaged unit passes is looked at. Nothing is changed, and a service
that runs is not disturbed. Limits are those of the running service, else those
of this process.

Only root can see all of that: as another user it says so and ends.

Exit codes:
  0  no problems; warnings are none
  1  problems were found
  2  usage`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := &checker{facts: observe()}
			c.run(cmd.Context(), cmd.Flags(), configFile)
			write := c.report.text
			if asJSON {
				write = c.report.json
			}
			if err := write(cmd.OutOrStdout()); err != nil {
				return err
			}
			if c.report.Problems > 0 {
				return &exitError{exitProblems, errors.New("this host is not ready")}
			}
			return nil
		},
	}
	config.BindFlags(cmd.Flags(), &flags)
	completeValues(cmd)
	cmd.Flags().StringVar(&configFile, "config", "", "TOML `FILE` (default "+config.DefaultFile+" when it exists)")
	cmd.Flags().String("ciphersuites", "", "accepted for the original's command lines, and ignored (`LIST`)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "report as JSON")
	return cmd
}

// The levels of findings.
const (
	levelOK      = "ok"
	levelWarning = "warning" // it works, but not as well as it could, or not for long
	levelProblem = "problem" // somebody will be refused
)

// finding is one thing that was looked at.
type finding struct {
	Level  string `json:"level"`
	What   string `json:"what"`
	Detail string `json:"detail"`
	Remedy string `json:"remedy,omitempty"` // one or more lines
}

// checkReport is what check found out.
type checkReport struct {
	Version  string    `json:"version"`
	Problems int       `json:"problems"`
	Warnings int       `json:"warnings"`
	Findings []finding `json:"findings"`
}

// checker looks at one thing after the other. Each look stands for itself, so
// that one problem does not hide the next.
type checker struct {
	facts  facts
	report checkReport

	// What earlier looks have found out.
	cfg     config.Config
	service int           // id of the running service's process, 0 without one
	session *xapi.Session // nil without xapi
	host    hostIdentity
	usable  bool // there is a certificate to serve
}

func (c *checker) run(ctx context.Context, flags *pflag.FlagSet, configFile string) {
	c.report.Version = buildinfo.Version()
	if !c.user() {
		return
	}
	c.configuration(flags, configFile)
	c.running(ctx)
	c.stateFolder()
	c.inventory()
	c.certificate()
	client := xapi.New(xapi.Config{Socket: c.cfg.XapiSocket, CallTimeout: checkTimeout})
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
	c.report.Findings = append(c.report.Findings, finding{levelOK, what, fmt.Sprintf(format, args...), ""})
}

func (c *checker) warning(what, remedy, format string, args ...any) {
	c.report.Warnings++
	c.report.Findings = append(c.report.Findings, finding{levelWarning, what, fmt.Sprintf(format, args...), remedy})
}

func (c *checker) problem(what, remedy, format string, args ...any) {
	c.report.Problems++
	c.report.Findings = append(c.report.Findings, finding{levelProblem, what, fmt.Sprintf(format, args...), remedy})
}

// checkTimeout bounds each call to xapi: one that takes longer is reported as a problem.
const checkTimeout = 10 * time.Second
