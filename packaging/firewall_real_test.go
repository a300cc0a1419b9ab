package packaging

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
)

// TestFirewallForReal runs the helper with the real tools, which the fakes do not cover, in a
// network namespace that has no other rules.
func TestFirewallForReal(t *testing.T) {
	requires.Root(t)
	watchSources(t)
	unshare := requires.Tool(t, "unshare")
	iptables, nft := requires.Tool(t, "iptables"), requires.Tool(t, "nft")
	requires.Tool(t, "ip6tables")
	helper, err := filepath.Abs("xapi-nbd-firewall")
	if err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin", "HELPER="+helper, "IPTABLES="+iptables, "NFT="+nft)
	if r := runIn(t, env, unshare, "--net", iptables, "-S", "INPUT"); r.code != 0 {
		t.Skipf("this kernel has no firewall for us: %s", strings.TrimSpace(r.stderr))
	}
	const twice = `
		status() { "$HELPER" status || true; }
		status; "$HELPER" open; "$HELPER" open; status; show; "$HELPER" close; "$HELPER" close; status`
	tests := []struct{ name, script, want string }{
		{"iptables", `
			show() { "$IPTABLES" -S INPUT | grep -c 10809; ip6tables -S INPUT | grep -c 10809; }
			"$IPTABLES" -A INPUT -j REJECT; ip6tables -A INPUT -j REJECT` + twice,
			"port 10809: closed (iptables)\nport 10809: open (iptables)\n1\n1\nport 10809: closed (iptables)\n"},
		{"nftables", `
			show() { "$NFT" list chain inet filter input | grep -c 10809; }
			"$NFT" add table inet filter
			"$NFT" add chain inet filter input '{ type filter hook input priority 0; policy drop; }'` + twice,
			"port 10809: closed (nftables)\nport 10809: open (nftables)\n1\nport 10809: closed (nftables)\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := mustRun(t, env, unshare, "--net", "sh", "-euc", tt.script); got != tt.want {
				t.Errorf("got\n%swant\n%s", got, tt.want)
			}
		})
	}
}
