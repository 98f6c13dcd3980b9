from cocodiff.cli import main

main()
