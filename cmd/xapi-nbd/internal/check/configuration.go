package check

import (
	"github.com/spf13/pflag"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
)

// configuration reads the settings as the service does, but goes on after each mistake, so
// that the other checks can run too.
func (c *checker) configuration(flags *pflag.FlagSet, file string) {
	cfg, source, mistakes := config.Inspect(flags, file)
	c.cfg = cfg
	for _, m := range mistakes {
		c.problem("configuration", m.Remedy, "%s", m.Text)
	}
	for _, note := range cfg.Notes() {
		c.warning("configuration", "Drop the flag.", "%s", note)
	}
	if len(mistakes) == 0 {
		c.ok("configuration", "%s", source)
	}
}
