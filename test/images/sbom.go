package images

import (
	"debug/buildinfo"
	"encoding/json"
	"maps"
	"slices"
	"time"
)

// spdxPackage is a package of an SPDX 2.3 document.
type spdxPackage struct {
	ID       string     `json:"SPDXID"`
	Name     string     `json:"name"`
	Version  string     `json:"versionInfo"`
	Download string     `json:"downloadLocation"`
	Analyzed bool       `json:"filesAnalyzed"`
	Sums     []checksum `json:"checksums,omitempty"`
	Refs     []spdxRef  `json:"externalRefs"`
}

type checksum struct {
	Algorithm string `json:"algorithm"`
	Value     string `json:"checksumValue"`
}

type spdxRef struct {
	Category string `json:"referenceCategory"`
	Type     string `json:"referenceType"`
	Locator  string `json:"referenceLocator"`
}

func purl(locator string) []spdxRef { return []spdxRef{{"PACKAGE-MANAGER", "purl", locator}} }

// sbom lists the Debian packages and the Go modules of an image, in SPDX.
func sbom(name, arch string, t *tree, packages, programs []string, at time.Time) ([]byte, error) {
	all := map[string]spdxPackage{}
	for _, p := range packages {
		version, err := t.control(p, "Version")
		if err != nil {
			return nil, err
		}
		sum, err := t.control(p, "X-SHA256")
		if err != nil {
			return nil, err
		}
		locator := "pkg:deb/debian/" + p + "@" + version + "?arch=" + arch + "&distro=bookworm"
		all[locator] = spdxPackage{Name: p, Version: version, Download: "NOASSERTION", Sums: []checksum{{"SHA256", sum}}, Refs: purl(locator)}
	}
	for _, program := range programs {
		info, err := buildinfo.ReadFile(program)
		if err != nil {
			return nil, err
		}
		golang := "pkg:golang/stdlib@" + info.GoVersion
		all[golang] = spdxPackage{Name: "stdlib", Version: info.GoVersion, Download: "NOASSERTION", Refs: purl(golang)}
		for _, m := range info.Deps {
			if m.Replace != nil {
				m = m.Replace
			}
			locator := "pkg:golang/" + m.Path + "@" + m.Version
			all[locator] = spdxPackage{Name: m.Path, Version: m.Version, Download: "NOASSERTION", Refs: purl(locator)}
		}
	}
	var list []spdxPackage
	var relations []map[string]string
	for _, locator := range slices.Sorted(maps.Keys(all)) {
		p := all[locator]
		p.ID = "SPDXRef-" + digest([]byte(locator))[len("sha256:"):][:20]
		list = append(list, p)
		relations = append(relations, map[string]string{"spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": p.ID})
	}
	return json.MarshalIndent(map[string]any{
		"spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT", "name": name + "-" + arch,
		"documentNamespace": "https://github.com/cryptcsi/cryptcsi/sbom/" + name + "/" + arch + "/" + digest([]byte(locators(list)))[len("sha256:"):],
		"creationInfo":      map[string]any{"created": at.UTC().Format(time.RFC3339), "creators": []string{"Tool: cryptcsi-images"}},
		"packages":          list, "relationships": relations,
	}, "", " ")
}

func locators(list []spdxPackage) (all string) {
	for _, p := range list {
		all += p.Refs[0].Locator + "\n"
	}
	return all
}
