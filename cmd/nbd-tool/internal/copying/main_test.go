package copying

import (
	"testing"

	"xapi-nbd/test/leaks"
)

func TestMain(m *testing.M) { leaks.Main(m) }
