package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

// listReport is the output of list --json; its keys are stable.
type listReport struct {
	Exports []listedExport `json:"exports"`
}

type listedExport struct {
	Name        string `json:"name"`
	Description string `json:"description"`
}

func newListCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List a server's exports",
		Long: `List the exports that a server is willing to list, one name per line, with the
description behind it. The export name of the URI does not matter.

With --json: {"exports": [{"name": …, "description": …}]}.`,
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return uriCommand(cmd, true, func(cmd *cobra.Command, t *target) error {
		client, err := t.dial(cmd.Context())
		if err != nil {
			return err
		}
		ctx, cancel := within(cmd.Context(), dialTimeout)
		defer cancel()
		exports, err := client.List(ctx)
		if err != nil {
			_ = client.Abort()
			return t.explain(err)
		}
		_ = client.Abort() // the list is complete
		report := listReport{Exports: []listedExport{}}
		for _, e := range exports {
			report.Exports = append(report.Exports, listedExport(e))
		}
		if asJSON {
			return printJSON(cmd.OutOrStdout(), report)
		}
		for _, e := range report.Exports {
			if _, err := fmt.Fprintln(cmd.OutOrStdout(), e.line()); err != nil {
				return err
			}
		}
		return nil
	})
}

// line returns an export as a line of text.
func (e listedExport) line() string {
	name := nameOrQuotes(e.Name)
	if e.Description == "" {
		return name
	}
	return name + "\t" + printable(e.Description)
}

// nameOrQuotes makes the empty export name visible.
func nameOrQuotes(name string) string {
	if name == "" {
		return `""`
	}
	return printable(name)
}
